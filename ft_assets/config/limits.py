"""Refuse numbers and names of finetune.yaml that no step can use."""

import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ft_assets.errors import ConfigError
from ft_assets.redaction import is_secret_name

LARGEST = 10**12  # no count, size or time of a project is larger
LONGEST_NAME = 100  # bytes; file systems have 255, and names of files have the base's name in them
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Names of the store, of which a partition's folder is a neighbour.
RESERVED = ("current", "manifest.json")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: Any) -> str:
    """Return the repr of a value, of a few lines at most."""
    return _short.repr(value)


def require_sane_numbers(path: Path, raw: dict[Any, Any]) -> None:
    """Raise ConfigError for a number that is infinite, not a number, or absurdly large."""
    for key, value in _leaves(raw, ()):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            found = f"is {value}"
        elif abs(value) > LARGEST:
            told = "" if is_secret_name(str(key[-1])) else f"is {shown(value)}: "
            found = f"{told}no count, size, rate or time is so large"
        else:
            continue
        raise ConfigError(
            where=f"{path}: {'.'.join(map(str, key))}",
            found=found,
            expected=f"a finite number of at most {LARGEST:.0e}",
            fix="correct the value",
        )


def _leaves(value: Any, key: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*key, index))
    else:
        yield key, value


def require_names(path: Path, names: Iterable[str]) -> None:
    """Raise ConfigError for a base model whose name cannot safely be that of a folder.

    Names are ASCII: letters that look alike in two scripts would be two models. Names that differ
    only in case would be one folder on some disks. A leading dot hides a folder, and a leading
    hyphen is an option for other programs.
    """
    seen: dict[str, str] = {}
    for name in names:
        found = expected = ""
        twin = seen.setdefault(name.casefold(), name)
        size = len(name.encode(errors="replace"))
        if not NAME.fullmatch(name) or "..." in name:
            found = "is not a name that a folder can safely have"
            expected = "letters and digits of ASCII, and . _ - after the first"
        elif size > LONGEST_NAME:
            found = f"has a name of {size} bytes"
            expected = f"at most {LONGEST_NAME}: folders and files are named after it"
        elif name.casefold() in RESERVED:
            found, expected = "is a name that the store uses itself", "another name"
        elif twin != name:
            found = f"differs from {twin} only in upper and lower case"
            expected = "names that are two folders on every disk"
        if found:
            shown_name = name if name.isprintable() and size <= LONGEST_NAME else shown(name)
            raise ConfigError(
                where=f"{path}: base_models.{shown_name}",
                found=found,
                expected=expected,
                fix="rename it",
            )
