"""Which rows are held out, and what is left to train on.

By hash of a row's group: growing the data never moves a row. What is trained and stands in the held-out or general rows
too (or in evaluation files of the user's), is nearly the same, or quotes one, is left out of training, and counted. Rows
are streamed: held are the groups and prompts of the kept-out side, and the ids of what is left out.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from ft_assets.config import DataSettings
from ft_assets.data.leakage import common_features, find_copies, within
from ft_assets.data.tables import (
    NEAR_DUPLICATE,
    TOKENIZED,
    TOKENIZED_PREFERENCE,
    Table,
    TableWriter,
    rows_of,
    select,
    write_table,
)
from ft_assets.errors import DataError

SOURCES = ("conversations", "rehearsal", "heldout", "retention", "preferences")
SIDES = ("train", "validation", "heldout", "retention", "preferences", "preferences_validation")
PAIRS = ("preferences", "preferences_validation")
LEAST_WATCHED_PAIRS = 8  # fewer say nothing of a DPO: they are trained on
MEMBERSHIP = ["id", "group", "stratum", "judged"]
STRATIFIED = ("train", "validation", "heldout")
PART = ""  # of a conversation that stands elsewhere whole: on no side, but nothing that is lost
Row = dict[str, Any]


class Side:
    """Some rows of a table, as often as they are asked for: those that `wanted` takes."""

    def __init__(self, path: Path, wanted: Callable[[Row], bool]) -> None:
        self.path, self.wanted = path, wanted

    def __len__(self) -> int:
        return sum(1 for row in Table(self.path, MEMBERSHIP) if self.wanted(row))

    def __iter__(self) -> Iterator[Row]:
        for batch in Table(self.path, [*MEMBERSHIP, "messages"]).batches():
            yield from rows_of(select(batch, self.wanted, MEMBERSHIP))


def is_heldout(group: str, share: float, salt: str = "") -> bool:
    """Return the side of a group. Depends on nothing but the group, the share and the salt."""
    value = int.from_bytes(hashlib.sha256(f"{salt}:{group}".encode()).digest()[:8], "big")
    return value / 2**64 < share


def make_split(
    chat: Path, targets: Path, output: Path, data: DataSettings
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the sides to `output`, and to its `info` what was left out and why. Returns (counts, version of each side).

    `chat` holds the rendered conversations, rehearsal, heldout (fixed, or empty), retention and preferences; `targets` are
    texts that must not be trained on. Raises DataError if no train or no held-out row is left.
    """
    tables = {name: chat / f"{name}.parquet" for name in SOURCES}
    fixed = len(Table(tables["heldout"])) > 0
    shares = data.stratify.shares if data.stratify else {}

    def held(row: Row) -> bool:
        return (
            not fixed
            and row["judged"]
            and is_heldout(
                row["group"],
                shares.get(row.get("stratum") or "", data.heldout_share),
                data.split_salt,
            )
        )

    kept = {
        row["group"]
        for path in (tables["retention"], tables["heldout"], targets)
        for row in Table(path, ["group"])
    }
    kept |= {row["group"] for row in Table(tables["conversations"], MEMBERSHIP) if held(row)}

    def rest(row: Row) -> bool:
        return row["group"] not in kept

    trained = {
        name: Side(tables[name], rest) for name in ("conversations", "rehearsal", "preferences")
    }
    kept_out = [
        Side(tables["conversations"], held),
        *(Side(path, _every) for path in (tables["heldout"], tables["retention"], targets)),
    ]
    common = common_features([*trained.values(), *kept_out], data)
    copies = find_copies(trained, kept_out, data, common)
    left_out = {name: {copy["id"] for copy in copies if copy["side"] == name} for name in trained}

    def watched(row: Row) -> bool:
        return is_heldout(row["group"], data.validation_share, f"{data.split_salt}:validation")

    pairs = Side(
        tables["preferences"],
        lambda row: rest(row) and row["id"] not in left_out["preferences"] and watched(row),
    )
    pairs_watched = len(pairs) >= LEAST_WATCHED_PAIRS

    def side(source: str, row: Row) -> str | None:
        if source in ("heldout", "retention"):
            return source if row["judged"] else PART
        if source == "conversations" and held(row):
            return "heldout"
        if not rest(row) or row["id"] in left_out[source]:
            return None if row.get("judged", True) else PART
        if source == "preferences":
            return "preferences_validation" if pairs_watched and watched(row) else source
        return "validation" if source == "conversations" and watched(row) else "train"

    counts, strata, versions = _write(tables, output, side)
    for name in ("train", "heldout"):
        if not counts[f"{name}_rows"]:
            raise DataError(
                where="split",
                found=f"no {name.replace('heldout', 'held-out')} rows out of {len(Table(tables['conversations']))}",
                expected="both sides filled",
                fix="add data, or change data.heldout_share",
            )
    counts["near_duplicates_removed"] = sum(map(len, left_out.values()))
    counts["first_near_duplicate"] = (
        "{side} {id} of {of}: {similarity:.2f}".format(**copies[0]) if copies else None
    )
    inside = within(
        {name: Side(output / f"{name}.parquet", _every) for name in SIDES}, data, common
    )
    counts |= {
        f"{name}_near_duplicates_within": sum(copy["side"] == name for copy in inside)
        for name in SIDES
    }
    (output / "info").mkdir()
    write_table(output / "info" / "near_duplicates.parquet", [*copies, *inside], NEAR_DUPLICATE)
    (output / "info" / "boilerplate.json").write_text(
        json.dumps({name: sorted(values) for name, values in common.items()})
    )
    (output / "info" / "strata.json").write_text(json.dumps(strata, indent=1, ensure_ascii=False))
    return counts, versions


def _every(_: Row) -> bool:
    return True


def _write(
    tables: dict[str, Path], output: Path, side: Callable[[str, Row], str | None]
) -> tuple[dict[str, Any], dict[str, dict[str, int]], dict[str, str]]:
    """Write each row to its side. Returns the counts, {stratum: {side: rows}} and the versions."""
    sources: Counter[tuple[str, str | None]] = Counter()
    strata: dict[str, dict[str, int]] = {}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                TableWriter(
                    output / f"{name}.parquet", TOKENIZED_PREFERENCE if name in PAIRS else TOKENIZED
                )
            )
            for name in SIDES
        }
        for source, path in tables.items():
            for batch in Table(path).batches():
                members = batch.select(
                    [name for name in MEMBERSHIP if name in batch.schema.names]
                ).to_pylist()
                chosen = [side(source, row) for row in members]
                for name in dict.fromkeys(name for name in chosen if name):
                    writers[name].copy(batch.filter(pa.array([entry == name for entry in chosen])))
                sources.update((source, name) for name in chosen)
                for row, name in zip(members, chosen, strict=True):
                    if row["stratum"] is not None and name in STRATIFIED:
                        strata.setdefault(row["stratum"], dict.fromkeys(STRATIFIED, 0))[name] += 1
        versions = {name: writer.version for name, writer in writers.items()}
    counts = {
        "train_rows": sources[("conversations", "train")],
        "rehearsal_rows": sources[("rehearsal", "train")],
        "validation_rows": sources[("conversations", "validation")],
        "heldout_rows": sources[("conversations", "heldout")] + sources[("heldout", "heldout")],
        "retention_rows": sources[("retention", "retention")],
        "preference_pairs": sources[("preferences", "preferences")],
        "preference_validation_pairs": sources[("preferences", "preferences_validation")],
        "train_rows_removed": sources[("conversations", None)],
        "rehearsal_rows_removed": sources[("rehearsal", None)],
        "pairs_removed": sources[("preferences", None)],
    }
    return counts, strata, versions
