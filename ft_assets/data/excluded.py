"""The rows that `data.exclude` leaves out of training."""

import re
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path

import pyarrow.compute as pc

from ft_assets.data.left_out import question
from ft_assets.data.tables import Table
from ft_assets.errors import DataError
from ft_assets.rows.types import MemberRow, RejectedRow

ID = re.compile(r"[0-9a-f]{6,16}")  # the beginning of an id; `ft rows` lists the first 8 characters
TRAINED = ("conversations", "rehearsal", "preferences")  # raw tables


def excluded_ids(root: Path, entries: Iterable[str]) -> list[str]:
    """Return the ids, or beginnings of ids, that `data.exclude` names, sorted.

    An entry is an id or a text file, relative to `root`, with an id at the beginning of each line.
    What follows a blank is a comment. Raises DataError with the file and line of anything else.
    """
    found: set[str] = set()
    for entry in entries:
        if ID.fullmatch(entry):
            found.add(entry)
            continue
        try:
            lines = (root / entry).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                where=f"data.exclude: {entry}",
                found=f"neither an id nor a text file that can be read ({error})",
                expected="the id of a row, or a file with an id in each line",
                fix="ft rows lists the ids; a file is relative to finetune.yaml",
            ) from None
        for number, line in enumerate(lines, start=1):
            word = line.split("#")[0].split()[:1]
            if word and not ID.fullmatch(word[0]):
                raise DataError(
                    where=f"{entry}:{number}",
                    found=f"{word[0][:40]!r} is not the id of a row",
                    expected="6 to 16 of the characters 0-9 and a-f at the beginning of the line",
                    fix="ft rows lists the ids; write a comment after #",
                )
            found.update(word)
    return sorted(found)


def excluded_rows(
    wanted: Sequence[str], tables: Sequence[Path], held_out: Callable[[set[str]], set[str]]
) -> dict[str, RejectedRow]:
    """Return the rows that are excluded: {id: its place and question}.

    `tables` are all raw tables. `held_out` returns which of some ids are held out by their hash.
    Raises DataError for an id of no row, of several rows, or of a row that is not trained.
    """
    if not wanted:
        return {}
    found = _found(wanted, tables)
    for one in wanted:
        ids = sorted({row_id for row_id, _ in found if row_id.startswith(one)})
        if len(ids) != 1:
            raise DataError(
                where=f"data.exclude: {one}",
                found=f"is the id of {len(ids) or 'no'} rows" + "".join(f" {it}" for it in ids[:3]),
                expected="the id of one row of data.train, data.rehearsal, or data.preferences",
                fix="write more of its characters"
                if ids
                else "remove it: the id follows from the text, so a corrected row has another one",
            )
    rows = {row_id: row for (row_id, table), row in found.items() if table in TRAINED}
    others = {row_id: row for (row_id, _), row in found.items()}
    for row_id in sorted((others.keys() - rows.keys()) | held_out(set(rows))):
        raise DataError(
            where=f"data.exclude: {row_id}",
            found=f"is not trained on: {others[row_id]['where']} is held out, general, or an "
            "example",
            expected="a row that is trained on: what a model is judged on is not chosen by id",
            fix="correct the row in its file, or remove it there, and remove it from data.exclude",
        )
    return rows


def _found(wanted: Sequence[str], tables: Sequence[Path]) -> dict[tuple[str, str], RejectedRow]:
    """Return the rows with one of the ids by (id, table)."""
    found: dict[tuple[str, str], RejectedRow] = {}
    starts = pc.MatchSubstringOptions(f"^({'|'.join(wanted)})")
    for path in tables:
        for batch in Table(path, ["id", "source", "messages"]).batches():
            hit = pc.call_function("match_substring_regex", [batch.column("id")], starts)
            for row in batch.filter(hit).to_pylist():
                found[row["id"], path.stem] = {
                    "where": row["source"],
                    "problem": f"data.exclude names its id {row['id']}",
                    "row": question(row["messages"]),
                    "kind": "excluded",
                }
    return found


def is_excluded(excluded: Container[str], row: MemberRow) -> bool:
    """Return True if a row of a rendered table is an excluded one, or a part of it."""
    return row["id"].partition(".")[0] in excluded
