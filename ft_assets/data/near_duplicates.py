"""Near-duplicate prompts: MinHash LSH (datasketch) for candidates, exact Jaccard similarity for the score.

A row is the set of word triples of what its user says (character 5-grams where words are few, as in Chinese). Triples
that many rows share are no sign of a copy but of a common instruction, and are left out. Only the rows that are looked
for are held in memory; the rows they are looked for in are read once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ft_assets.data.canonical import normalise

PERMUTATIONS = 128
COMMON = 0.02  # share of all rows from which on a shingle is boilerplate
COMMON_LEAST = 5  # rows
SAMPLE = 20_000  # rows that boilerplate is counted on: those with the smallest hash of their id
SHORT = 5  # words below which characters are compared
SEED = 1
MISSED = 1e-6
MOST_CANDIDATES = (
    50  # of a row among its own kind, so that a thousand copies are not a million pairs
)

Match = tuple[str, str, float]
Shingles = frozenset[int]


def near_duplicates(
    trained: Sequence[dict[str, Any]],
    kept_out: Sequence[dict[str, Any]],
    threshold: float,
    common: Shingles | None = None,
) -> list[Match]:
    """Return (trained id, kept-out id, Jaccard similarity ≥ threshold) for prompts that are nearly the same, the most alike first."""
    if not len(trained) or not len(kept_out):
        return []
    index = NearIndex(
        kept_out, threshold, boilerplate(trained, kept_out) if common is None else common
    )
    return in_order(index.matches(trained))


def near_within(rows: Sequence[dict[str, Any]], threshold: float, common: Shingles) -> list[Match]:
    """Return (id, id of an earlier row, similarity) of each row that is nearly an earlier one of the same rows; of more
    than SAMPLE rows only a sample is compared, by hash of the id."""
    some = list(sample(len(rows), rows))
    position = {row["id"]: number for number, row in enumerate(some)}
    best: dict[str, Match] = {}
    for one, other, score in NearIndex(some, threshold, common).matches(some, MOST_CANDIDATES):
        if position[other] < position[one] and score > best.get(one, (one, "", 0.0))[2]:
            best[one] = (one, other, score)
    return in_order(best.values())


def in_order(matches: Iterable[Match]) -> list[Match]:
    """Return matches without repetition, the most alike first."""
    return sorted(set(matches), key=lambda match: (-match[2], match[:2]))


def sample(total: int, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield about SAMPLE of the rows: all of them if there are not more, else by hash of the id."""
    import xxhash

    limit = 2**64 if total <= SAMPLE else int(2**64 * (SAMPLE / total))
    for row in rows:
        if xxhash.xxh3_64_intdigest(row["id"].encode()) < limit:
            yield row


def boilerplate(
    *sides: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], frozenset[int]] | None = None
) -> frozenset[int]:
    """Return the shingles (or what else `of` a row is compared) that many rows share: 2 % of all, and 5 at least.

    Of many rows they are counted on a sample.
    """
    total = sum(map(len, sides))
    # Each kind of row once: many copies of one row would make its own words look like boilerplate.
    kinds = {(of or shingles)(row) for side in sides for row in sample(total, side)}
    counts = Counter(shingle for kind in kinds for shingle in kind)
    limit = max(COMMON_LEAST, COMMON * min(total, SAMPLE))
    return frozenset(shingle for shingle, count in counts.items() if count > limit)


def shingles(row: dict[str, Any]) -> Shingles:
    """Return the hashed word triples of what the user says."""
    import xxhash

    text = normalise(
        "\n".join(turn["content"] for turn in row["messages"] if turn["role"] in ("user", "text"))
    )
    words = text.split()
    if len(words) < SHORT:
        grams: Iterable[str] = (text[index : index + 5] for index in range(max(1, len(text) - 4)))
    else:
        grams = (" ".join(words[index : index + 3]) for index in range(len(words) - 2))
    return frozenset(xxhash.xxh32_intdigest(gram.encode()) for gram in grams)


class NearIndex:
    """Finds the rows that are nearly one of the rows given here."""

    def __init__(self, rows: Iterable[dict[str, Any]], threshold: float, common: Shingles) -> None:
        from datasketch import MinHashLSH

        self.threshold, self.common, self.sets = threshold, common, {}
        self.index = MinHashLSH(params=bands(threshold), num_perm=PERMUTATIONS)
        for row, own, signature in self._signed(rows):
            if row["id"] not in self.sets:
                self.sets[row["id"]] = own
                self.index.insert(row["id"], signature)

    def __len__(self) -> int:
        return len(self.sets)

    def matches(self, rows: Iterable[dict[str, Any]], most: int | None = None) -> Iterator[Match]:
        """Yield (id, id of the row it is nearly, similarity); of at most `most` candidates a row."""
        for row, own, signature in self._signed(rows):
            others: list[Any] = sorted(self.index.query(signature))
            for other in others[:most]:
                score = len(own & self.sets[other]) / len(own | self.sets[other])
                if score >= self.threshold:
                    yield row["id"], other, score

    def _signed(
        self, rows: Iterable[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], Shingles, Any]]:
        from datasketch import MinHash

        empty = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=_identity)
        for row in rows:
            whole = shingles(row)
            own = (
                whole - self.common or whole
            )  # two prompts of nothing but boilerplate are compared whole
            signature = empty.copy()
            signature.update_batch(own)
            yield row, own, signature


def bands(threshold: float) -> tuple[int, int]:
    """Return (bands, rows a band) with which a pair at the threshold is missed less than once in a million.

    LSH misses a pair of similarity s with probability (1 - s^rows)^bands (Broder 1997). The library's own choice weighs
    misses against candidates: at 0.8 it misses more than one in ten. Candidates cost little here, the score decides.
    """
    fitting = [
        rows for rows in range(1, 9) if (1 - threshold**rows) ** (PERMUTATIONS // rows) < MISSED
    ]
    rows = max(fitting, default=1)
    return PERMUTATIONS // rows, rows


def _identity(value: int) -> int:
    return value
