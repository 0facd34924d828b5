"""`ft init`, the data file: the format, columns and answers of its first rows."""

from dataclasses import dataclass
from pathlib import Path

from ft_assets.commands.init.answers import Answers
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.file_formats import read_rows
from ft_assets.errors import DataError
from ft_assets.rows.row_formats import recognise, renamed
from ft_assets.rows.types import RawFields
from ft_assets.rows.values import RowProblem

LOOKED_AT = 1000  # rows
SHOWN = 3  # reasons


@dataclass
class Found:
    """The rows of a file. `total` counts all rows read; `valid` and `reasons` the first 1000."""

    shape: str
    columns: dict[str, str]
    answers: Answers
    looked_at: int = 0
    valid: int = 0
    total: int = 0
    ended: bool = True  # whether the file was read to its end
    reasons: tuple[str, ...] = ()


def look(path: Path, columns: dict[str, str]) -> Found:
    """Read the first rows of a file, and more while all answers have one form.

    Raises DataError if no row can be used.
    """
    if not path.is_file():
        raise DataError(
            where=str(path),
            found="does not exist",
            expected="a data file of conversations",
            fix="correct the path",
        )
    found, reasons = Found("", columns, Answers()), list[str]()
    for row in read_rows(path):
        # A form of the first 1000 rows must hold in all rows: a later label would stop the
        # evaluation.
        if found.total >= LOOKED_AT and not found.answers.have_a_form:
            found.ended = False
            break
        found.total += 1
        first = found.total <= LOOKED_AT
        found.looked_at += first
        try:
            if row.value is None:
                raise RowProblem(row.problem or "is not an object")
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
            where=str(path),
            found="has no usable row" + "".join(f"\n    {reason}" for reason in reasons)
            if found.total
            else "has no rows",
            expected="conversations: messages, ShareGPT, Alpaca, or prompt and completion",
            fix="name the columns: --prompt COLUMN --completion COLUMN"
            if found.total
            else "give a file with rows",
        )
    return found


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
