"""Find rows on two sides of a split, whatever they share: a prompt, a part of one, an answer.

The split removes them from the trained side, and the check looks again. The split decides once
what many rows share and stores it, so that both compare alike.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ft_assets.config import DataSettings
from ft_assets.data.asked import asked
from ft_assets.data.boilerplate import Common, Rows, common_of, sample
from ft_assets.data.clusters import Clusters
from ft_assets.data.leak_index import Found, LeakIndex
from ft_assets.data.left_out import VERBS
from ft_assets.data.near_duplicates import NearIndex
from ft_assets.data.tables import Table
from ft_assets.rows.types import CopyRow, MemberRow, TextRow

TRAINED = ("train", "validation", "preferences", "preferences_validation")
HELD_OUT = ("heldout", "retention")
TEXTS = ["id", "group", "messages", "chosen", "rejected"]  # the last two only of pairs
PROMPTS_ONLY = DataSettings(train=[], near_duplicate=None, quoted=None)
MAX_CANDIDATES = 50  # of a row within its own side: a thousand copies are not a million pairs
ORDER = list(VERBS)


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


def find_copies(
    trained: Mapping[str, Rows], held_out: Mapping[str, Rows], data: DataSettings, common: Common
) -> tuple[list[CopyRow], Common]:
    """Return a copy for each row of `trained` that repeats a row of `held_out`.

    Of several held-out rows it names the one that the row repeats most surely. The slots that the
    rows of both show are added to `common`.
    """
    index = LeakIndex(held_out, data, common)
    best: dict[tuple[str, str], Found] = {}
    for side, rows in trained.items() if len(index) else ():
        for row in rows:
            if found := _surest(index.matches(row, side)):
                best[side, row["id"]] = found
    for row, found in index.decided():
        best[row] = min(best.get(row, found), found, key=_sureness)
    copies = [
        _copy(side, identity, found, index.side_of[found.of])
        for (side, identity), found in best.items()
    ]
    return sorted(copies, key=_order), replace(common, slots=index.slots)


def _surest(matches: Iterator[Found]) -> Found | None:
    """Return the best match of the first kind, without looking for other kinds."""
    best: Found | None = None
    for found in matches:
        if best and best.kind != found.kind:
            break
        best = min(best or found, found, key=_sureness)
    return best


def _sureness(found: Found) -> tuple[int, float, str]:
    return ORDER.index(found.kind), -found.similarity, found.of


def _order(copy: CopyRow) -> tuple[int, float, str, str]:
    return ORDER.index(copy["kind"]), -copy["similarity"], copy["side"], copy["id"]


def _copy(side: str, identity: str, found: Found, of_side: str) -> CopyRow:
    return {
        "kind": found.kind,
        "side": side,
        "id": identity,
        "of_side": of_side,
        "of": found.of,
        "similarity": found.similarity,
    }


def pairs_within(rows: Rows, data: DataSettings, common: Common) -> Iterator[tuple[str, Found]]:
    """Yield (id, found) of the rows whose prompts repeat another row of the same side."""
    index = LeakIndex({"": rows}, data, common, answers=False)
    for row in rows:
        for found in index.matches(row, most=MAX_CANDIDATES):
            if found.of != row["id"]:
                yield row["id"], found
    for (_, identity), found in index.decided():
        yield identity, found


def within(sides: Mapping[str, Rows], data: DataSettings, common: Common) -> list[CopyRow]:
    """Return the rows whose prompts are nearly those of an earlier row of their own side.

    They are counted and shown, not filtered. Of a large side only a sample is compared.
    """
    copies: list[CopyRow] = []
    for name, rows in sides.items() if data.near_duplicate else ():
        index = NearIndex(data.near_duplicate or 1)
        for row in sample(len(rows), rows):
            own = common.own(asked(row).whole.shingles)
            near = [(-score, of) for of, score in index.matches(own, MAX_CANDIDATES)]
            if near:
                found = Found("within", min(near)[1], -min(near)[0])
                copies.append(_copy(name, row["id"], found, name))
            index.add(row["id"], own)
    return sorted(copies, key=lambda copy: (copy["side"], -copy["similarity"], copy["id"]))


def clusters(rows: Rows, data: DataSettings) -> dict[str, str]:
    """Return the cluster of each row.

    Rows of one group, of one chat, or with nearly the same prompt have one cluster. Only the rows
    themselves decide, so other data change no cluster.
    """
    found = Clusters(rows)
    for identity, other in pairs_within(rows, data, common_of([rows])):
        found.join(identity, other.of)
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
    shared = _shared_prompts(split, few_shot)
    copies = copies_of_held_out(
        {name: texts(split / f"{name}.parquet") for name in TRAINED},
        split,
        targets,
        near_duplicate=data.near_duplicate,
        quoted=data.quoted,
    )
    sentences = [
        f"{one.side} {one.id} and {one.other_side} {one.other_id} share their prompt"
        for one in shared
    ]
    sentences += [
        f"{copy['side']} {copy['id']} {VERBS[copy['kind']]} {copy['of_side']} {copy['of']}, "
        f"similarity {copy['similarity']:.2f}"
        for copy in copies
    ]
    kinds = Counter(copy["kind"] for copy in copies)
    return Leaks(sentences, {"overlaps": len(shared), **kinds})


def copies_of_held_out(
    trained: Mapping[str, Rows],
    split: Path,
    targets: Path,
    *,
    near_duplicate: float | None,
    quoted: float | None,
) -> list[CopyRow]:
    """Return a copy for each row of `trained` that repeats a held-out row of a written split.

    `targets` is the table of `data.contamination`. The two limits are those of `data`.
    """
    held_out = {name: texts(split / f"{name}.parquet") for name in HELD_OUT}
    copies, _ = find_copies(
        trained,
        {**held_out, "contamination": texts(targets)},
        DataSettings(train=[], near_duplicate=near_duplicate, quoted=quoted),
        Common.read(split / "info" / "boilerplate.json"),
    )
    return copies


def _shared_prompts(split: Path, few_shot: Path) -> list[Overlap]:
    ids = {name: _members(split / f"{name}.parquet") for name in (*TRAINED, *HELD_OUT)}
    few_shot_index = LeakIndex({"few_shot": texts(few_shot)}, PROMPTS_ONLY, Common())
    return [
        *overlaps(heldout=ids["heldout"], retention=ids["retention"]),
        *overlaps(train=ids["train"], validation=ids["validation"]),
        *overlaps(
            preferences=ids["preferences"], preferences_validation=ids["preferences_validation"]
        ),
        *(
            Overlap("few_shot", found.of, "heldout", row["id"])
            for row in texts(split / "heldout.parquet")
            for found in itertools.islice(few_shot_index.matches(row), 1)
        ),
    ]


def _members(path: Path) -> Table[MemberRow]:
    return Table(path, ["id", "group"])


def texts(path: Path) -> Table[TextRow]:
    """Return the rows of a table with the columns that are compared."""
    return Table(path, TEXTS)
