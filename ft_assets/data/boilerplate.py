"""Find what many prompts share, which shows no copy: instructions, canned answers, known words.

Rows are clustered first. What only one family of paraphrases shares is not boilerplate, however
large the family is. All is counted on a sample, so memory does not grow with the data.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from ft_assets.data.asked import asked
from ft_assets.data.texts import GRAM, Hashes, Text
from ft_assets.rows.types import TextRow

COMMON = 0.02  # share of all rows above which a feature is boilerplate
MIN_COMMON = 5  # rows
CANNED = 3  # clusters of prompts with one short answer: it is a label
SAMPLE = 20_000  # rows on which is counted: those with the smallest hash of their id
OWNERS = 16  # rows with a feature that are clustered
ALIKE = 0.5  # share of common words from which two rows may be one family
SLOT = 3  # words that differ in a family whose answers are equal
NEARLY_ALL = 0.75  # share of a family's rows that have one of its words
RECURRING = 3  # rows
AFFIX = 0.8  # share of recurring phrases among what differs in a family


class Rows(Protocol):
    """Rows that have a length and can be iterated more than once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[TextRow]: ...


@dataclass(frozen=True)
class Common:
    """What many clusters of rows share.

    `shingles`: triples of units of prompts. `grams`: runs of 13 units of all texts. `answers`:
    short answers. `words`: units of several rows. `slots`: short prompts without one unit, of
    which the rows fill the gap in several ways. `families`: (shingle, its family of paraphrases).
    """

    shingles: frozenset[int] = frozenset()
    grams: frozenset[int] = frozenset()
    answers: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset()
    slots: frozenset[int] = frozenset()
    families: frozenset[tuple[int, int]] = frozenset()

    def own(self, shingles: frozenset[int]) -> frozenset[int]:
        """Return the shingles without boilerplate; all of them if they are all boilerplate."""
        return shingles - self.shingles or shingles

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({name: sorted(kept) for name, kept in asdict(self).items()}))

    @classmethod
    def read(cls, path: Path) -> "Common":
        stored = json.loads(path.read_text())
        lists = {kept.name: stored.get(kept.name, []) for kept in fields(cls)}
        lists["families"] = map(tuple, lists["families"])
        return cls(**{name: frozenset(kept) for name, kept in lists.items()})


@dataclass(frozen=True, eq=False)
class _Sampled:
    """The features of a row of the sample. `words` are the hashes of its prompt's units."""

    shingles: Hashes
    grams: Hashes
    words: frozenset[int]
    answer: int | None


def answer_key(answer: Text) -> int:
    """Return the hash of a whole answer."""
    return int(answer.runs(len(answer.units))[0]) if answer.units else 0


def sample(total: int, rows: Iterable[TextRow], most: int = SAMPLE) -> Iterator[TextRow]:
    """Yield about `most` of the rows, by hash of the id; all rows if there are not more."""
    limit = 2**64 if total <= most else int(2**64 * (most / total))
    for row in rows:
        if _order(row) < limit:
            yield row


def common_of(sides: Sequence[Rows]) -> Common:
    """Return what many clusters of rows share. Two rows with one prompt are one cluster."""
    total = sum(map(len, sides))
    rows = sorted((row for side in sides for row in sample(total, side)), key=_order)
    sampled = [_sampled(row) for row in rows]
    limit = max(MIN_COMMON, COMMON * min(total, SAMPLE))
    answers = [
        np.array([] if row.answer is None else [row.answer], dtype=np.uint64) for row in sampled
    ]
    words = [np.array(sorted(row.words), dtype=np.uint64) for row in sampled]
    shared, families = _shared([row.shingles for row in sampled], sampled, limit)
    return Common(
        shingles=shared,
        families=families,
        grams=_shared([row.grams for row in sampled], sampled, limit)[0],
        answers=_shared(answers, sampled, CANNED - 1)[0],
        words=frozenset(_frequent(words, CANNED - 1).tolist()),
    )


def _order(row: TextRow) -> int:
    return xxhash.xxh3_64_intdigest(row["id"].encode())


def _sampled(row: TextRow) -> _Sampled:
    found = asked(row)
    prompt = found.whole
    grams = [text.runs(GRAM) for text in found.texts()]
    answer = found.turns[-1][1] if found.turns[-1][0] == "assistant" else None
    return _Sampled(
        np.array(sorted(prompt.shingles), dtype=np.uint64),
        np.unique(np.concatenate(grams)),
        frozenset((prompt.text.hashes >> np.uint64(32)).tolist()),
        answer_key(answer) if answer else None,
    )


def _frequent(features: list[Hashes], limit: float) -> Hashes:
    if not features:
        return np.array([], dtype=np.uint64)
    values, counts = np.unique(np.concatenate(features), return_counts=True)
    return values[counts > limit]


def _shared(
    features: list[Hashes], rows: list[_Sampled], limit: float
) -> tuple[frozenset[int], frozenset[tuple[int, int]]]:
    """Return the features that more than `limit` clusters of rows share, and those of families.

    A family is named by one of its rows.
    """
    recurring = frozenset(_frequent([row.shingles for row in rows], RECURRING - 1).tolist())
    joined = list(range(len(rows)))  # a forest of rows: each points to one of its family
    shared: set[int] = set()
    family_of: dict[int, int] = {}
    known: dict[bytes, tuple[int, list[list[int]]]] = {}
    for feature, count, owners in _owned(features, _frequent(features, limit)):
        if (name := owners.tobytes()) not in known:
            known[name] = _clusters(rows, owners.tolist(), recurring)
        alone, families = known[name]
        if len(families) + alone * count / len(owners) > limit:
            shared.add(feature)
            continue
        for family in families:
            if _scattered([rows[index] for index in family]):
                for index in family:
                    joined[_root(joined, index)] = _root(joined, family[0])
                family_of[feature] = family[0]
    named = {(feature, _root(joined, index)) for feature, index in family_of.items()}
    return frozenset(shared), frozenset(named)


def _root(joined: list[int], index: int) -> int:
    while joined[index] != index:
        index = joined[index]
    return index


def _owned(
    features: list[Hashes], wanted: Hashes
) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """Yield (feature, number of its rows, the first rows with it) of the wanted features."""
    if not len(wanted):
        return
    values = np.concatenate(features)
    owners = np.repeat(np.arange(len(features)), [len(one) for one in features])
    kept = np.isin(values, wanted)
    order = np.argsort(values[kept], kind="stable")
    values, owners = values[kept][order], owners[kept][order]
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])).tolist()
    for start, stop in pairwise([*starts, len(values)]):
        yield int(values[start]), stop - start, owners[start : min(stop, start + OWNERS)]


def _clusters(
    rows: list[_Sampled], chosen: list[int], recurring: frozenset[int]
) -> tuple[int, list[list[int]]]:
    """Return how many of the chosen rows are in no family, and the families of the others."""
    left, alone = chosen, 0
    families: list[list[int]] = []
    while left:
        group, left = [left[0]], left[1:]
        for index in group:  # grows while it is read
            near = [other for other in left if _alike(rows[index].words, rows[other].words)]
            left = [other for other in left if other not in near]
            group += near
        if len(group) > 1 and _is_family([rows[index] for index in group], recurring):
            families.append(group)
        else:
            alone += len(group)
    return alone, families


def _alike(one: frozenset[int], other: frozenset[int]) -> bool:
    return len(one & other) >= ALIKE * len(one | other)


def _is_family(rows: list[_Sampled], recurring: frozenset[int]) -> bool:
    """Return True if rows with similar prompts paraphrase one prompt.

    Prompts of a template all have its words, and their own text is in no other prompt. Paraphrases
    differ in many places, or in phrases that recur. If the rows differ in a few words, equal
    answers show that these words are no content.
    """
    if len(rows) == 2 or _scattered(rows):
        return True
    shared = _usual([frozenset(row.shingles.tolist()) for row in rows])
    own = [frozenset(row.shingles.tolist()) - shared for row in rows]
    if sum(map(len, own)) and sum(len(one & recurring) for one in own) >= AFFIX * sum(
        map(len, own)
    ):
        return True
    core = _usual([row.words for row in rows])
    answers = {row.answer for row in rows}
    few = all(len(row.words - core) <= SLOT < len(core) for row in rows)
    return few and len(answers) == 1 and None not in answers


def _scattered(rows: list[_Sampled]) -> bool:
    """Return True if most rows lack one of the usual words.

    A word that half of the rows have may be one of two that fill a slot of a template.
    """
    core = _usual([row.words for row in rows], NEARLY_ALL)
    return len(rows) > 2 and 2 * sum(not core <= row.words for row in rows) >= len(rows)


def _usual(features: list[frozenset[int]], share: float = 0.5) -> frozenset[int]:
    """Return what at least this share of the rows has."""
    counts = Counter(feature for one in features for feature in one)
    least = share * len(features)
    return frozenset(feature for feature, count in counts.items() if count >= least)
