"""`ft init`, the data: the format, columns and answers of its first rows."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ft_assets.commands.init.answers import Answers
from ft_assets.commands.init.column_names import guessed
from ft_assets.commands.init.sources import Sources, inside, rows_of, sources_of
from ft_assets.config import GateSettings
from ft_assets.data.canonical import conversation, preference
from ft_assets.errors import DataError
from ft_assets.rows.cells import plain
from ft_assets.rows.columns import Columns
from ft_assets.rows.row_formats import recognise, renamed
from ft_assets.rows.types import RawFields
from ft_assets.rows.values import RowProblem

LOOKED_AT = 1000  # rows
SHOWN = 3  # reasons


@dataclass
class Found:
    """The rows of the files. `total` counts all rows read; `valid` and `reasons` the first 1000."""

    shape: str
    columns: dict[str, str]
    answers: Answers
    sources: Sources
    encoding: str | None = None
    looked_at: int = 0
    valid: int = 0
    total: int = 0
    ended: bool = True  # whether the files were read to their end
    reasons: tuple[str, ...] = ()
    heldout: int = 0  # rows of the files that are held out, as far as they matter
    unread: str = ""  # text columns that are not read, with their numbers of rows


def look(
    path: Path,
    columns: dict[str, str],
    encoding: str | None = None,
    ignored_keys: Sequence[str] = (),
) -> Found:
    """Read the first rows of a file or folder, and more while all answers have one form.

    Raises DataError if no row can be used, or if the user has to choose between two columns.
    """
    sources = sources_of(path, encoding, ignored_keys)
    if not columns.keys() - {"prompt", "completion"}:
        columns = sources.columns or _usual_columns(sources.files, encoding, columns)
    found = Found("", columns, Answers(), sources, encoding)
    audit = Columns(renamed=columns, ignored=frozenset(sources.ignored))
    reasons = list[str]()
    first_row: RawFields = {}
    for row in rows_of(sources.files, encoding, ignored_keys):
        # A form of the first 1000 rows must hold in all rows: a later label would stop the
        # evaluation.
        if found.total >= LOOKED_AT and not found.answers.have_a_form:
            found.ended = False
            break
        found.total += 1
        first = found.total <= LOOKED_AT
        found.looked_at += first
        first_row = first_row or row.value or {}
        try:
            if row.value is None:
                raise RowProblem(row.problem or "is not an object")
            raw = plain(renamed(row.value, columns) if columns else row.value)
            _require_clear(row.where, audit, raw)
            read = conversation(raw)
        except RowProblem as problem:
            if first and len(reasons) < SHOWN:
                reasons.append(f"{row.where}: {problem}{_preferences(row.value)}")
            continue
        audit.count(raw, read)
        found.valid += first
        found.shape = found.shape or shape_of(raw)
        found.answers.add(str(read["messages"][-1].get("content") or ""))
    found.reasons = tuple(reasons)
    found.unread = audit.described()
    held = rows_of(inside(sources.heldout), encoding, ignored_keys)
    found.heldout = sum(1 for _ in islice(held, GateSettings().min_heldout_rows))
    if not found.answers.count:
        raise _unusable(path, found, first_row)
    return found


def _usual_columns(
    files: list[Path], encoding: str | None, given: dict[str, str]
) -> dict[str, str]:
    """Return data.columns for rows whose columns have usual names of another spelling.

    `given` are the columns that the user has named.
    """
    if len(given) > 1:
        return given
    row = next((row.value for row in rows_of(files, encoding) if row.value), {})
    if not row or recognise(plain(renamed(row, given) if given else row)) is not None:
        return given
    return guessed(row, given) or given


def _require_clear(where: str, audit: Columns, raw: RawFields) -> None:
    question = audit.question(raw)
    if question is None:
        return
    flags = [
        " ".join(f"--column {ours}={json.dumps(name)}" for ours, name in entry.items())
        + f" ({meaning})"
        for meaning, entry in question.answers
    ]
    raise DataError(
        where=where,
        found=question.found,
        expected="one column for each part of a row",
        fix="choose: " + ", or ".join(flags),
    )


def _unusable(path: Path, found: Found, row: RawFields) -> DataError:
    """Return the error of a file without a usable row, with advice for its columns."""
    if not found.total:
        return DataError(
            where=str(path),
            found="has no rows",
            expected="conversations, or pairs",
            fix="give a file with rows",
        )
    texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
    fix = f"correct the rows (the first has the columns {', '.join(row) or '(none)'})"
    unread = [
        key
        for reason in found.reasons
        for key in re.findall(r"ignore_turn_keys: \[(.+?)\]", reason)
    ]
    if unread:
        flags = " ".join(f"--ignore-turn-key {key}" for key in dict.fromkeys(unread))
        fix = f"if the model does not need it: {flags}"
    if not found.columns and recognise(plain(row)) is None:
        fix = "name the columns: --prompt COLUMN --completion COLUMN"
        if len(texts) == 2:
            fix = "name the columns: " + ", or ".join(
                f"--prompt {one} --completion {other}" for one, other in (texts, texts[::-1])
            )
    return DataError(
        where=str(path),
        found="has no usable row" + "".join(f"\n    {reason}" for reason in found.reasons),
        expected="conversations: messages, ShareGPT, Alpaca, or prompt and completion",
        fix=fix,
    )


def _preferences(raw: RawFields | None) -> str:
    try:
        preference(raw or {})
    except RowProblem:
        return ""
    return (
        " (it is a preference: such a file belongs under data.preferences, beside one of "
        "conversations)"
    )


def shape_of(raw: RawFields) -> str:
    """Return the format of a valid conversation row, with the keys that show it."""
    recognised = recognise(raw)
    if recognised is None:
        return ""
    row_format, keys = recognised
    return row_format.label.format(*keys)
