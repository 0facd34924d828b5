"""`ft init`: a first finetune.yaml for a data file, with what its rows say of the task. Reads and writes files, nothing else."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_assets.commands.answers import Answers
from ft_assets.commands.base_source import BaseSource
from ft_assets.commands.shape import shape_of
from ft_assets.commands.yaml_text import project_text
from ft_assets.config import CONFIG_NAME, load_project
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.formats import read_rows
from ft_assets.data.shapes import renamed
from ft_assets.data.turns import RowProblem
from ft_assets.errors import ConfigError, DataError

LOOKED_AT = 1000
SHOWN = 3


@dataclass
class Found:
    """What the rows of a file say. `total` counts all rows that were read; `valid` and `reasons` are of the first 1000."""

    shape: str
    columns: dict[str, str]
    answers: Answers
    looked_at: int = 0
    valid: int = 0
    total: int = 0
    ended: bool = True  # whether the file was read to its end
    reasons: tuple[str, ...] = ()


def look(path: Path, columns: dict[str, str]) -> Found:
    """Read the first rows of a file, and more while all answers have one form. Raises DataError if none can be used."""
    if not path.is_file():
        raise DataError(str(path), "there is no such file", "a data file of conversations", "correct the path")
    found, reasons = Found("", columns, Answers()), list[str]()
    for row in read_rows(path):
        # What is seen in 1000 rows must hold in all of them: a label that comes later would stop the evaluation.
        if found.total >= LOOKED_AT and not found.answers.have_a_form:
            found.ended = False
            break
        found.total += 1
        first = found.total <= LOOKED_AT
        found.looked_at += first
        try:
            if row.value is None:
                raise RowProblem(row.problem or "is no object")
            raw = renamed(row.value, columns) if columns else row.value
            messages = conversation(raw)["messages"]
        except RowProblem as problem:
            if first and len(reasons) < SHOWN:
                reasons.append(f"{row.where}: {problem}{_preferences(row.value)}")
            continue
        found.valid += first
        found.shape = found.shape or shape_of(raw)
        found.answers.add(str(messages[-1].get("content") or ""))
    found.reasons = tuple(reasons)
    if not found.answers.count:
        raise DataError(
            str(path),
            "has no row that can be used" + "".join(f"\n    {reason}" for reason in reasons) if found.total else "has no rows",
            "conversations: messages, ShareGPT, Alpaca, or prompt and completion",
            "name the columns: --prompt COLUMN --completion COLUMN" if found.total else "give a file with rows",
        )
    return found


def _preferences(raw: dict[str, Any] | None) -> str:
    try:
        preference(raw or {})
    except RowProblem:
        return ""
    return " (it is a preference: such a file belongs under data.preferences, beside one of conversations)"


def write_project(data_file: Path, base: str | None, folder: Path, columns: dict[str, str]) -> tuple[Path, Found, BaseSource]:
    """Write finetune.yaml into `folder`. Raises ConfigError if there is one, DataError, ModelError."""
    target = folder / CONFIG_NAME
    if target.exists():
        raise ConfigError(str(target), "is there already", "a folder without one: nothing is overwritten", "edit it, or give another --dir")
    source = BaseSource.of(base, folder)
    found = look(data_file, columns)
    relative = os.path.relpath(data_file.resolve(), folder.resolve())
    text = project_text(Path(relative).as_posix(), source, found)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(str(target), "is there already", "a folder without one: nothing is overwritten", "edit it") from None
    try:
        load_project(target)
    except ConfigError:
        target.unlink()  # nothing half-right is left behind
        raise
    return target, found, source


def said(path: Path, found: Found, source: BaseSource) -> str:
    """Return what `ft init` prints."""
    looked = f"the first {found.looked_at}" if not found.ended or found.total > LOOKED_AT else f"{found.looked_at}"
    lines = [f"shape: {found.shape}", f"rows: {found.valid} of {looked} can be used"]
    lines += [f"  {reason}" for reason in found.reasons]
    lines.append(f"answers: {found.answers.said()}")
    if source.note:
        lines.append(f"base: {source.note}")
    return "\n".join([*lines, f"wrote {path}", "next: ft doctor, then ft run"])


def facts(path: Path, found: Found, source: BaseSource) -> dict[str, Any]:
    """Return the same as plain data; `looked_at`: not all rows, unless `complete`."""
    return {
        "path": str(path),
        "shape": str(found.shape),
        "rows_valid": found.valid,
        "rows_looked_at": found.looked_at,
        "complete": found.ended and found.total <= LOOKED_AT,
        "unusable": list(found.reasons),
        "answers": found.answers.said(),
        "base_model": {"name": source.name, source.kind: source.value, "note": source.note},
    }
