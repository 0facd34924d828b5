"""Read data files into raw rows. A row keeps the file and line it came from, for the messages.

Formats here: JSON lines (`.jsonl`) and a JSON list (`.json`). Not here: what a row means (canonical.py).
"""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_assets.errors import DataError


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in a file; `problem` says why it is not an object."""

    where: str
    value: dict[str, Any] | None
    problem: str | None = None


def resolve_files(root: Path, patterns: list[str], key: str) -> list[Path]:
    """Return the files that patterns name, sorted. Raises DataError for a pattern that matches nothing."""
    files: set[Path] = set()
    for pattern in patterns:
        found = [Path(match) for match in glob.glob(str(root / pattern), recursive=True) if Path(match).is_file()]
        if not found:
            raise DataError(
                f"finetune.yaml: {key}: {pattern}",
                f"no file matches below {root}",
                "an existing file or glob",
                "correct the path; it is relative to finetune.yaml",
            )
        files.update(found)
    return sorted(files)


def read_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a .jsonl or .json file. Raises DataError for a file that cannot be read at all."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            str(path), f"is not UTF-8 (byte {error.start})", "UTF-8 text", "convert it, e.g. with iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "a readable file", "check the path and its permissions") from None
    if path.suffix == ".json":
        yield from _json_list(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_line(f"{path.name}:{number}", line)


def _json_line(where: str, line: str) -> RawRow:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return RawRow(where, None, f"is not JSON: {error.msg} at column {error.colno}")
    if not isinstance(value, dict):
        return RawRow(where, None, f"is a {type(value).__name__}, not an object")
    return RawRow(where, value)


def _json_list(path: Path, text: str) -> Iterator[RawRow]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}",
            f"is not JSON: {error.msg}",
            "a JSON list of objects",
            "correct it, or name the file .jsonl if it has one object a line",
        ) from None
    if not isinstance(values, list):
        raise DataError(str(path), f"holds a {type(values).__name__}", "a JSON list of objects", "wrap it in [ ]")
    for index, value in enumerate(values):
        where = f"{path.name}[{index}]"
        yield RawRow(where, value) if isinstance(value, dict) else RawRow(where, None, f"is a {type(value).__name__}, not an object")
