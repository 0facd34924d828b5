"""What stands on two sides of a split: the same prompt, nearly the same, or quoted. The split removes it, the check looks again.

What counts as a common instruction is decided once, by the split, and kept with it: the check asks the same question.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ft_assets.config import DataSettings
from ft_assets.data.near_duplicates import NearIndex, boilerplate, in_order, near_within
from ft_assets.data.ngrams import GramIndex, grams
from ft_assets.data.tables import Table

TRAINED = ("train", "validation", "preferences", "preferences_validation")
KEPT_OUT = ("heldout", "retention")
TEXTS = ["id", "group", "messages"]
Rows = Sequence[dict[str, Any]] | Any  # or what has a length and is iterated as often as needed
Copy = dict[str, Any]
Common = dict[str, frozenset[int]]


class Chain:
    """Several sides, one after the other, as often as they are asked for."""

    def __init__(self, sides: Iterable[Rows]) -> None:
        self.sides = list(sides)

    def __len__(self) -> int:
        return sum(map(len, self.sides))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(self.sides)


def common_features(sides: Sequence[Rows], data: DataSettings) -> Common:
    """Return what many rows share, and is no sign of a copy: word triples, and runs of 13 words."""
    return {
        "triples": boilerplate(*sides) if data.near_duplicate else frozenset(),
        "grams": boilerplate(*sides, of=grams) if data.quoted else frozenset(),
    }


def find_copies(
    trained: Mapping[str, Rows], kept_out: Iterable[Rows], data: DataSettings, common: Common
) -> list[Copy]:
    """Return the rows of `trained` that are nearly rows of `kept_out`, or quote their prompts: {kind, side, id, of, similarity}."""
    indices: list[tuple[str, Any]] = []
    if data.near_duplicate:
        indices.append(
            ("near-duplicate", NearIndex(Chain(kept_out), data.near_duplicate, common["triples"]))
        )
    if data.quoted:
        indices.append(("quoted", GramIndex(Chain(kept_out), data.quoted, common["grams"])))
    return [
        {"kind": kind, "side": name, "id": one, "of": other, "similarity": score}
        for kind, index in indices
        if len(index)
        for name, rows in trained.items()
        for one, other, score in in_order(index.matches(rows))
    ]


def within(sides: Mapping[str, Rows], data: DataSettings, common: Common) -> list[Copy]:
    """Return the rows that are nearly an earlier row of their own side: they are counted and shown, not left out."""
    if not data.near_duplicate:
        return []
    return [
        {"kind": "within", "side": name, "id": one, "of": other, "similarity": score}
        for name, rows in sides.items()
        for one, other, score in near_within(rows, data.near_duplicate, common["triples"])
    ]


def overlaps(**sides: Iterable[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return (side, id, other side, id) for each group that stands on two sides."""
    seen: dict[str, tuple[str, str]] = {}
    found = []
    for name, rows in sides.items():
        for row in rows:
            side, identity = seen.setdefault(row["group"], (name, row["id"]))
            if side != name:
                found.append((side, identity, name, row["id"]))
    return found


def leaks(
    split: Path, targets: Path, few_shot: Path, data: DataSettings
) -> tuple[list[str], dict[str, int]]:
    """Return what leaks in a split as it was written, as sentences, and the counts by kind.

    Train and preferences may share prompts: they are two trainings of one model.
    """
    ids = {
        name: Table(split / f"{name}.parquet", ["id", "group"]) for name in (*TRAINED, *KEPT_OUT)
    }
    trained = Chain(ids[name] for name in TRAINED)
    found = [
        *overlaps(trained=trained, heldout=ids["heldout"], retention=ids["retention"]),
        *overlaps(train=ids["train"], validation=ids["validation"]),
        *overlaps(
            preferences=ids["preferences"], preferences_validation=ids["preferences_validation"]
        ),
        *overlaps(trained=trained, contamination=Table(targets, ["id", "group"])),
        *overlaps(few_shot=Table(few_shot, ["id", "group"]), heldout=ids["heldout"]),
    ]
    stored = json.loads((split / "info" / "boilerplate.json").read_text())
    copies = find_copies(
        {name: Table(split / f"{name}.parquet", TEXTS) for name in TRAINED},
        [*(Table(split / f"{name}.parquet", TEXTS) for name in KEPT_OUT), Table(targets, TEXTS)],
        data,
        {name: frozenset(values) for name, values in stored.items()},
    )
    verbs = {"near-duplicate": "is nearly", "quoted": "quotes"}
    sentences = [
        f"{one} {identity} and {other} {same} share their prompt"
        for one, identity, other, same in found
    ]
    sentences += [
        f"{copy['side']} {copy['id']} {verbs[copy['kind']]} {copy['of']}, similarity {copy['similarity']:.2f}"
        for copy in copies
    ]
    near = sum(copy["kind"] == "near-duplicate" for copy in copies)
    return sentences, {
        "overlaps": len(found),
        "near_duplicates": near,
        "quotes": len(copies) - near,
    }
