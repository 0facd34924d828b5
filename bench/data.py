"""Read public data files and say what was found: rows, rejected rows with their reasons, doubles, near-duplicates.

    python bench/data.py <file> [--pairs] [--columns prompt=text,completion=category] [--against <file>]

`--against` names a second file (a published test set, say) and lists what stands in both.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

from ft_assets.data.canonical import Validated, conversation, preference, validate
from ft_assets.data.formats import read_rows
from ft_assets.data.near import near_duplicates
from ft_assets.data.split import overlaps


def load(path: Path, pairs: bool, columns: dict[str, str]) -> Validated:
    begun = time.perf_counter()
    found = validate(read_rows(path), preference if pairs else conversation, columns)
    rate = found.total / (time.perf_counter() - begun)
    print(
        f"{path.name}: {found.total} rows, {len(found.rows)} used, {found.duplicates} doubles, {len(found.rejected)} rejected, {rate:.0f} rows/s"
    )
    for reason, count in Counter(row["problem"] for row in found.rejected).most_common(5):
        print(f"    {count} × {reason}")
    groups = Counter(row["group"] for row in found.rows)
    print(f"    {sum(count - 1 for count in groups.values())} more rows share their prompt with another")
    print(f"    {sum(any(turn['role'] == 'system' for turn in row['messages']) for row in found.rows)} with a system turn")
    return found


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--against", type=Path)
    arguments.add_argument("--pairs", action="store_true")
    arguments.add_argument("--columns", default="")
    given = arguments.parse_args()
    columns = dict(part.split("=") for part in given.columns.split(",") if part)
    left = load(given.file, given.pairs, columns)
    if given.against is None:
        return
    right = load(given.against, given.pairs, columns)
    same = overlaps(left=left.rows, right=right.rows)
    begun = time.perf_counter()
    near = near_duplicates(left.rows, right.rows, 0.8)
    print(f"{len({match[3] for match in same})} rows of {given.against.name} share their prompt with a row of {given.file.name}")
    print(
        f"{len({match[1] for match in near})} are at least 0.8 alike, found in {time.perf_counter() - begun:.1f} s; the least alike of them:"
    )
    text = {row["id"]: row["messages"][0]["content"] for row in (*left.rows, *right.rows)}
    for one, other, score in near[-5:]:
        print(f"    {score:.2f}  {text[one]!r}\n          {text[other]!r}")


if __name__ == "__main__":
    main()
