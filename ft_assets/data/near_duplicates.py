"""Find near-duplicate prompts.

MinHash LSH (datasketch) gives the candidates, exact Jaccard similarity the score. A row is the set
of word triples of its context (character 5-grams where words are few, as in Chinese). Triples
that many rows share show a common instruction, not a copy, and are filtered. Only the indexed rows
are in memory; the rows that are compared with them are read once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from ft_assets.data.units import normalise
from ft_assets.rows.types import TextRow

PERMUTATIONS = 128
COMMON = 0.02  # share of all rows above which a shingle is boilerplate
MIN_COMMON = 5  # rows
SAMPLE = 20_000  # rows on which boilerplate is counted: those with the smallest hash of their id
SHORT = 5  # words; below, characters are compared
SEED = 1
MISSED = 1e-6
MAX_CANDIDATES = 50  # of a row within its own side: a thousand copies are not a million pairs

Match = tuple[str, str, float]  # (id, id of the other row, score)
Shingles = frozenset[int]


class Rows(Protocol):
    """Rows that have a length and can be iterated more than once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[TextRow]: ...


def near_duplicates(
    trained: Rows, held_out: Rows, threshold: float, common: Shingles | None = None
) -> list[Match]:
    """Return (trained id, held-out id, similarity ≥ threshold) of near-duplicate prompts.

    The most similar come first.
    """
    if not len(trained) or not len(held_out):
        return []
    if common is None:
        common = boilerplate(trained, held_out)
    return in_order(NearIndex(held_out, threshold, common).matches(trained))


def near_within(rows: Rows, threshold: float, common: Shingles) -> list[Match]:
    """Return (id, id of an earlier row, similarity) of each row that is nearly an earlier one.

    Of more than SAMPLE rows only a sample is compared, by hash of the id.
    """
    sampled = list(sample(len(rows), rows))
    position = {row["id"]: number for number, row in enumerate(sampled)}
    index = NearIndex(sampled, threshold, common)
    best: dict[str, Match] = {}
    for one, other, score in index.matches(sampled, MAX_CANDIDATES):
        if position[other] < position[one] and score > best.get(one, (one, "", 0.0))[2]:
            best[one] = (one, other, score)
    return in_order(best.values())


def in_order(matches: Iterable[Match]) -> list[Match]:
    """Return matches without repetition, the most similar first."""
    return sorted(set(matches), key=lambda match: (-match[2], match[:2]))


def sample(total: int, rows: Iterable[TextRow]) -> Iterator[TextRow]:
    """Yield about SAMPLE of the rows, by hash of the id; all rows if there are not more."""
    import xxhash

    limit = 2**64 if total <= SAMPLE else int(2**64 * (SAMPLE / total))
    for row in rows:
        if xxhash.xxh3_64_intdigest(row["id"].encode()) < limit:
            yield row


def boilerplate(
    *sides: Rows, of: Callable[[TextRow], frozenset[int]] | None = None
) -> frozenset[int]:
    """Return the features that many rows share: 2 % of all rows, and at least 5.

    `of` returns the features of a row, by default its shingles. Of many rows they are counted on a
    sample.
    """
    total = sum(map(len, sides))
    # Each set of features once: many copies of one row would make its own words boilerplate.
    distinct = {(of or shingles)(row) for side in sides for row in sample(total, side)}
    counts = Counter(feature for features in distinct for feature in features)
    limit = max(MIN_COMMON, COMMON * min(total, SAMPLE))
    return frozenset(feature for feature, count in counts.items() if count > limit)


def shingles(row: TextRow) -> Shingles:
    """Return the hashed word triples of the context before the judged answer."""
    import xxhash

    turns = row["messages"]
    context = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    text = normalise("\n".join(turn["content"] for turn in context))
    words = text.split()
    if len(words) < SHORT:
        grams: Iterable[str] = (text[index : index + 5] for index in range(max(1, len(text) - 4)))
    else:
        grams = (" ".join(words[index : index + 3]) for index in range(len(words) - 2))
    return frozenset(xxhash.xxh32_intdigest(gram.encode()) for gram in grams)


class NearIndex:
    """Finds the rows that are nearly one of the indexed rows."""

    def __init__(self, rows: Iterable[TextRow], threshold: float, common: Shingles) -> None:
        from datasketch import MinHashLSH

        self.threshold = threshold
        self.common = common
        self.sets: dict[str, Shingles] = {}
        self.index = MinHashLSH(params=bands(threshold), num_perm=PERMUTATIONS)
        for row, own, signature in self._signed(rows):
            if row["id"] not in self.sets:
                self.sets[row["id"]] = own
                self.index.insert(row["id"], signature)

    def __len__(self) -> int:
        return len(self.sets)

    def matches(
        self, rows: Iterable[TextRow], max_candidates: int | None = None
    ) -> Iterator[Match]:
        """Yield (id, id of the indexed row that it nearly is, similarity)."""
        for row, own, signature in self._signed(rows):
            others: list[Any] = sorted(self.index.query(signature))
            for other in others[:max_candidates]:
                score = len(own & self.sets[other]) / len(own | self.sets[other])
                if score >= self.threshold:
                    yield row["id"], other, score

    def _signed(self, rows: Iterable[TextRow]) -> Iterator[tuple[TextRow, Shingles, Any]]:
        from datasketch import MinHash

        empty = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=_identity)
        for row in rows:
            whole = shingles(row)
            # Two prompts that consist of boilerplate are compared as a whole.
            own = whole - self.common or whole
            signature = empty.copy()
            signature.update_batch(own)
            yield row, own, signature


def bands(threshold: float) -> tuple[int, int]:
    """Return (bands, rows a band) that miss a pair at the threshold less than once in a million.

    LSH misses a pair of similarity s with probability (1 - s^rows)^bands (Broder 1997). The
    library's own choice weighs misses against candidates: at 0.8 it misses more than one in ten.
    Candidates cost little here, because the score decides.
    """
    fitting = [
        rows for rows in range(1, 9) if (1 - threshold**rows) ** (PERMUTATIONS // rows) < MISSED
    ]
    rows = max(fitting, default=1)
    return PERMUTATIONS // rows, rows


def _identity(value: int) -> int:
    return value
