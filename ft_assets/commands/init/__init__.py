"""`ft init`: a first finetune.yaml for a data file or a folder, derived from its rows."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from ft_assets.commands.init.base_source import BaseSource
from ft_assets.commands.init.survey import LOOKED_AT, Found, look
from ft_assets.commands.init.yaml_text import project_text, share
from ft_assets.config import CONFIG_NAME, GateSettings, load_project
from ft_assets.errors import ConfigError

DG_TOML = """\
# For Dagster's command dg; ft does not read it.
directory_type = "project"

[project]
root_module = "ft_assets"
code_location_name = "ft_assets"
code_location_target_module = "ft_assets.definitions"
"""


SHOWN = 5  # names of files in a line


def write_project(
    data: Path,
    base: str | None,
    folder: Path,
    columns: dict[str, str],
    encoding: str | None = None,
    ignored_keys: Sequence[str] = (),
) -> tuple[Path, Found, BaseSource]:
    """Write finetune.yaml into `folder`, and dg.toml if dg has no settings there.

    Raises ConfigError if finetune.yaml exists, DataError, ModelError.
    """
    target = folder / CONFIG_NAME
    if target.exists():
        raise ConfigError(
            where=str(target),
            found="is there already",
            expected="a folder without one: nothing is overwritten",
            fix="edit it, or give another --dir",
        )
    source = BaseSource.of(base, folder)
    found = look(data, columns, encoding, ignored_keys)
    text = project_text(lambda path: _relative(path, folder), source, found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            where=str(target),
            found="is there already",
            expected="a folder without one: nothing is overwritten",
            fix="edit it",
        ) from None
    except OSError as error:
        raise ConfigError(
            where=str(target),
            found=f"cannot be written ({error.strerror})",
            expected="a folder that this user may write",
            fix="give another --dir",
        ) from None
    try:
        load_project(target)
    except ConfigError:
        target.unlink()  # leave no invalid file behind
        raise
    if not any((folder / name).exists() for name in ("dg.toml", "pyproject.toml")):
        (folder / "dg.toml").write_text(DG_TOML)
    return target, found, source


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def describe(path: Path, found: Found, source: BaseSource) -> str:
    """Return the text that `ft init` prints."""
    looked = (
        f"the first {found.looked_at}"
        if not found.ended or found.total > LOOKED_AT
        else f"{found.looked_at}"
    )
    unread = f"; not read: {found.unread}" if found.unread else ""
    lines = [f"shape: {found.shape}{unread}", f"rows: {found.valid} of {looked} can be used"]
    lines += [f"{key}: {names}" for key, names in _used(found).items() if names]
    lines += [f"  {reason}" for reason in found.reasons]
    lines.append(f"answers: {found.answers.describe()}")
    if source.note:
        lines.append(f"base: {source.note}")
    lines.append(
        "general prompts: none named. data.retention measures forgetting; `data.rehearsal: self` "
        "trains the base's own answers against it"
    )
    lines += _too_few_held_out(found)
    return "\n".join([*lines, f"wrote {path}", "next: ft doctor, then ft run"])


def _too_few_held_out(found: Found) -> list[str]:
    """Return a warning if the share of the rows that is held out is too small for a PASS."""
    least = GateSettings().min_heldout_rows
    if found.sources.heldout and found.heldout < least:
        return [
            f"held out: {found.heldout} rows, and a PASS needs {least} (gate.min_heldout_rows): "
            "add rows to data.heldout, or remove the key to hold out a share of train"
        ]
    if found.sources.heldout or not found.ended:
        return []
    held = round(share(found) * found.valid)
    if held >= least:
        return []
    return [
        f"held out: about {held} rows, and a PASS needs {least} (gate.min_heldout_rows): "
        f"add rows, {math.ceil(least / 0.3)} or more, or name a file in data.heldout"
    ]


def _used(found: Found) -> dict[str, str]:
    """Return what the command chose for the user, by key of `data`."""
    sources, several = found.sources, len(found.sources.files) > 1
    return {
        "trained": _names(sources.files) if several else "",
        "columns": ", ".join(f"{ours} is {theirs}" for ours, theirs in found.columns.items()),
        "held out": _names(sources.heldout),
        "pairs": _names(sources.preferences),
        "not used": _names(sources.unused),
        "documents, not used": (
            f"{_names(sources.documents)} (data.text trains on them before SFT)"
            if sources.documents
            else ""
        ),
    }


def _names(paths: Sequence[Path]) -> str:
    more = f", and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(path.name for path in paths[:SHOWN]) + more


class Summary(BaseModel, frozen=True):
    """What `ft init --json` prints. `complete` is true if all rows were validated."""

    path: str
    shape: str
    rows_valid: int
    rows_looked_at: int
    complete: bool
    unusable: list[str]
    unread: str
    answers: str
    base_model: dict[str, str | None]


def summary(path: Path, found: Found, source: BaseSource) -> Summary:
    """Return the result of `write_project` for --json."""
    return Summary(
        path=str(path),
        shape=found.shape,
        rows_valid=found.valid,
        rows_looked_at=found.looked_at,
        complete=found.ended and found.total <= LOOKED_AT,
        unusable=list(found.reasons),
        unread=found.unread,
        answers=found.answers.describe(),
        base_model={"name": source.name, source.kind: source.value, "note": source.note},
    )
