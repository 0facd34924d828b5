"""Read public data files and print their rows, rejected rows, duplicates and near-duplicates.

    python bench/data.py <folder>
    python bench/data.py <file> [--pairs] [--against <file>]
        [--columns prompt=text,completion=category]

The script reads all .json, .jsonl and .csv files of a folder as conversations. It reads them as
preferences if their rows have the keys of preferences. `--against` names a second file, such as a
published test set, and lists the rows that are in both.
"""

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ft_assets.config import DataSettings
from ft_assets.data.boilerplate import common_of
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.file_formats import read_rows
from ft_assets.data.ingest import Ingest, Ingested
from ft_assets.data.kto import pair_labels
from ft_assets.data.leakage import find_copies, overlaps
from ft_assets.data.tables import CONVERSATION, PREFERENCE, REJECTED, TableWriter, read_table

PAIRED = ("chosen", "label")
COLUMNS = {  # files that need named columns, by one of their columns
    "category": {"prompt": "text", "completion": "category"},
    "answer_matching_behavior": {
        "prompt": "question",
        "chosen": "answer_matching_behavior",
        "rejected": "answer_not_matching_behavior",
    },
}


@dataclass
class Loaded:
    """The rows and the counts of one file."""

    counts: Ingested
    rows: list[dict[str, Any]]
    problems: Counter[str]
    seconds: float


def load(path: Path, pairs: bool, columns: dict[str, str] | None) -> Loaded:
    """Read a file like the graph; return its rows and counts."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with TableWriter(folder / "rejected.parquet", REJECTED) as rejected:
            raw = pair_labels(read_rows(path), None, columns) if pairs else read_rows(path)
            form, layout = (preference, PREFERENCE) if pairs else (conversation, CONVERSATION)
            counts = Ingest(folder, folder, rejected).source(
                "rows", raw, form, layout, None if pairs else columns
            )
        problems = Counter(row["problem"] for row in read_table(folder / "rejected.parquet"))
        return Loaded(
            counts, read_table(folder / "rows.parquet"), problems, time.perf_counter() - begun
        )


def shown(path: Path, found: Loaded) -> None:
    """Print the counts of a file."""
    counts, rows = found.counts, found.rows
    print(
        f"{path.name}: {counts.total} rows, {counts.rows} used, {counts.duplicates} duplicates, "
        f"{counts.rejected} rejected, "
        f"{counts.total / found.seconds:.0f} rows/s"
    )
    for reason, count in found.problems.most_common(3):
        print(f"    {count} × {reason}")
    groups = Counter(row["group"] for row in rows)
    roles = Counter(role for row in rows for role in {turn["role"] for turn in row["messages"]})
    calls = sum(any("tool_calls" in turn for turn in row["messages"]) for row in rows)
    print(
        f"    {len(rows) - len(groups)} more rows share their prompt with another; "
        f"{roles['system']} with a system turn, {calls} with tool calls"
    )


def against(left: Loaded, right: Loaded, names: tuple[str, str]) -> None:
    """Print the rows that are in both files."""
    same = overlaps(left=left.rows, right=right.rows)
    begun = time.perf_counter()
    settings = DataSettings(train=[])
    sides: Any = [{"left": left.rows}, {"right": right.rows}]
    common = common_of([left.rows, right.rows])  # type: ignore[list-item]
    copies, _ = find_copies(sides[0], sides[1], settings, common)
    seconds = time.perf_counter() - begun
    words = [
        {" ".join(row["messages"][0]["content"].lower().split()) for row in side.rows}
        for side in (left, right)
    ]
    print(
        f"{len(words[0] & words[1])} texts of {names[0]} stand in {names[1]} but for case and "
        f"white space,"
    )
    print(f"{len({overlap.id for overlap in same})} but for punctuation too;")
    kinds = Counter(copy["kind"] for copy in copies)
    print(f"{len(copies)} repeat a row, found in {seconds:.1f} s: {dict(kinds)}; the last of each:")
    text = {row["id"]: row["messages"][0]["content"] for row in (*left.rows, *right.rows)}
    for copy in {copy["kind"]: copy for copy in copies}.values():
        shown = f"{copy['kind']} {copy['similarity']:.2f}"
        print(f"    {shown}  {text[copy['id']]!r}\n          {text[copy['of']]!r}")


def of_folder(folder: Path) -> None:
    """Print the counts of every file of a folder."""
    for path in sorted(
        path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".csv")
    ):
        first = next((row.value for row in read_rows(path) if row.value), None)
        if first is None:
            print(f"{path.name}: holds no rows")
            continue
        columns = next((named for column, named in COLUMNS.items() if column in first), None)
        shown(
            path, load(path, any(key in first or key in (columns or {}) for key in PAIRED), columns)
        )


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--against", type=Path)
    arguments.add_argument("--pairs", action="store_true")
    arguments.add_argument("--columns", default="")
    given = arguments.parse_args()
    if given.file.is_dir():
        of_folder(given.file)
        return
    read = partial(
        load,
        pairs=given.pairs,
        columns=dict(part.split("=") for part in given.columns.split(",") if part) or None,
    )
    left = read(given.file)
    shown(given.file, left)
    if given.against is not None:
        right = read(given.against)
        shown(given.against, right)
        against(left, right, (given.file.name, given.against.name))


if __name__ == "__main__":
    main()
