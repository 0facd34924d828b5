"""Find rows on two sides of a split: the same prompt, nearly the same prompt, or a quoted prompt.

The split removes them from the trained side, and the check looks again. The split decides once
which features are a common instruction and stores them, so that both compare alike.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ft_assets.config import DataSettings
from ft_assets.data.clusters import Clusters
from ft_assets.data.near_duplicates import (
    MAX_CANDIDATES,
    NearIndex,
    Rows,
    boilerplate,
    in_order,
    near_within,
)
from ft_assets.data.ngrams import GramIndex, grams
from ft_assets.data.tables import Table
from ft_assets.rows.types import CopyKind, CopyRow, MemberRow, TextRow

TRAINED = ("train", "validation", "preferences", "preferences_validation")
HELD_OUT = ("heldout", "retention")
TEXTS = ["id", "group", "messages"]
VERBS = {"near-duplicate": "is nearly", "quoted": "quotes"}


@dataclass(frozen=True)
class Common:
    """The features that many rows share: hashed word triples, and hashed runs of 13 words."""

    triples: frozenset[int]
    grams: frozenset[int]

    def write(self, path: Path) -> None:
        stored = {"triples": sorted(self.triples), "grams": sorted(self.grams)}
        path.write_text(json.dumps(stored))

    @classmethod
    def read(cls, path: Path) -> "Common":
        stored = json.loads(path.read_text())
        return cls(frozenset(stored["triples"]), frozenset(stored["grams"]))


@dataclass(frozen=True)
class Overlap:
    """Two rows of one group on two sides."""

    side: str
    id: str
    other_side: str
    other_id: str


@dataclass(frozen=True)
class Leaks:
    """The leaks of a split, as sentences, and their counts by kind."""

    sentences: list[str]
    counts: dict[str, int]


class Chain:
    """Several sides, one after the other; it can be iterated more than once."""

    def __init__(self, sides: Iterable[Rows]) -> None:
        self.sides = list(sides)

    def __len__(self) -> int:
        return sum(map(len, self.sides))

    def __iter__(self) -> Iterator[TextRow]:
        return itertools.chain.from_iterable(self.sides)


def common_features(sides: Sequence[Rows], data: DataSettings) -> Common:
    """Return the features that many rows share, which do not show a copy."""
    return Common(
        triples=boilerplate(*sides) if data.near_duplicate else frozenset(),
        grams=boilerplate(*sides, of=grams) if data.quoted else frozenset(),
    )


def find_copies(
    trained: Mapping[str, Rows], held_out: Iterable[Rows], data: DataSettings, common: Common
) -> list[CopyRow]:
    """Return the rows of `trained` that are nearly rows of `held_out` or quote their prompts."""
    held_out = list(held_out)
    copies: list[CopyRow] = []
    if data.near_duplicate:
        near = NearIndex(Chain(held_out), data.near_duplicate, common.triples)
        copies += _copies("near-duplicate", near, trained)
    if data.quoted:
        copies += _copies("quoted", GramIndex(Chain(held_out), data.quoted, common.grams), trained)
    return copies


def _copies(
    kind: CopyKind, index: NearIndex | GramIndex, trained: Mapping[str, Rows]
) -> list[CopyRow]:
    if not len(index):
        return []
    return [
        _copy(kind, name, *match)
        for name, rows in trained.items()
        for match in in_order(index.matches(rows))
    ]


def _copy(kind: CopyKind, side: str, identity: str, of: str, similarity: float) -> CopyRow:
    return {"kind": kind, "side": side, "id": identity, "of": of, "similarity": similarity}


def within(sides: Mapping[str, Rows], data: DataSettings, common: Common) -> list[CopyRow]:
    """Return the rows that are nearly an earlier row of their own side.

    They are counted and shown, not filtered.
    """
    if not data.near_duplicate:
        return []
    return [
        _copy("within", name, *match)
        for name, rows in sides.items()
        for match in near_within(rows, data.near_duplicate, common.triples)
    ]


def clusters(rows: Rows, data: DataSettings) -> dict[str, str]:
    """Return the cluster of each row. Rows of one group, or nearly the same, have one cluster.

    Only the rows themselves decide, so other data change no cluster.
    """
    found = Clusters(rows)
    if data.near_duplicate:
        index = NearIndex(rows, data.near_duplicate, boilerplate(rows))
        for one, other, _ in index.matches(rows, MAX_CANDIDATES):
            found.join(one, other)
    return found.names()


def overlaps(**sides: Iterable[MemberRow]) -> list[Overlap]:
    """Return an overlap for each row whose group is on another side too."""
    seen: dict[str, tuple[str, str]] = {}
    found: list[Overlap] = []
    for name, rows in sides.items():
        for row in rows:
            side, identity = seen.setdefault(row["group"], (name, row["id"]))
            if side != name:
                found.append(Overlap(side, identity, name, row["id"]))
    return found


def leaks(split: Path, targets: Path, few_shot: Path, data: DataSettings) -> Leaks:
    """Return the leaks of a split as it was written.

    Train and preferences may share prompts: they are two trainings of one model.
    """
    shared = _shared_prompts(split, targets, few_shot)
    copies = find_copies(
        {name: _texts(split / f"{name}.parquet") for name in TRAINED},
        [*(_texts(split / f"{name}.parquet") for name in HELD_OUT), _texts(targets)],
        data,
        Common.read(split / "info" / "boilerplate.json"),
    )
    sentences = [
        f"{one.side} {one.id} and {one.other_side} {one.other_id} share their prompt"
        for one in shared
    ]
    sentences += [
        f"{copy['side']} {copy['id']} {VERBS[copy['kind']]} {copy['of']}, "
        f"similarity {copy['similarity']:.2f}"
        for copy in copies
    ]
    near = sum(copy["kind"] == "near-duplicate" for copy in copies)
    counts = {
        "overlaps": len(shared),
        "near_duplicates": near,
        "quotes": len(copies) - near,
    }
    return Leaks(sentences, counts)


def _shared_prompts(split: Path, targets: Path, few_shot: Path) -> list[Overlap]:
    ids = {name: _members(split / f"{name}.parquet") for name in (*TRAINED, *HELD_OUT)}

    def trained() -> Iterator[MemberRow]:
        return itertools.chain.from_iterable(ids[name] for name in TRAINED)

    return [
        *overlaps(trained=trained(), heldout=ids["heldout"], retention=ids["retention"]),
        *overlaps(train=ids["train"], validation=ids["validation"]),
        *overlaps(
            preferences=ids["preferences"], preferences_validation=ids["preferences_validation"]
        ),
        *overlaps(trained=trained(), contamination=_members(targets)),
        *overlaps(few_shot=_members(few_shot), heldout=ids["heldout"]),
    ]


def _members(path: Path) -> Table[MemberRow]:
    return Table(path, ["id", "group"])


def _texts(path: Path) -> Table[TextRow]:
    return Table(path, TEXTS)
