"""Find near-duplicate prompts.

MinHash LSH (datasketch) gives the candidates, exact Jaccard similarity the score. A prompt is the
set of its shingles, without those that many clusters of rows share: these show a common
instruction, not a copy. Only the indexed prompts are in memory.
"""

from collections.abc import Iterator
from typing import Any

PERMUTATIONS = 128
SEED = 1
MISSED = 1e-6

Shingles = frozenset[int]


class NearIndex:
    """Finds the indexed sets of shingles that are nearly a set."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        self._sets: list[tuple[str, Shingles]] = []
        self._added: set[Shingles] = set()
        self._known: set[int] = set()
        self._index = MinHashLSH(params=bands(threshold), num_perm=PERMUTATIONS)
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=_identity)

    def add(self, identity: str, own: Shingles) -> None:
        """Index a set. Of equal sets the first is kept."""
        if own in self._added:
            return
        self._added.add(own)
        self._index.insert(len(self._sets), self._signature(own))
        self._sets.append((identity, own))
        self._known |= own

    def matches(self, own: Shingles, most: int | None = None) -> Iterator[tuple[str, float]]:
        """Yield (id, similarity ≥ threshold) of the indexed sets, of at most `most` candidates."""
        # Of two sets of this similarity one has at least this share in common with the other.
        if not own or len(own & self._known) < self.threshold * len(own):
            return
        candidates: list[Any] = sorted(self._index.query(self._signature(own)))
        for number in candidates[:most]:
            identity, other = self._sets[number]
            score = len(own & other) / len(own | other)
            if score >= self.threshold:
                yield identity, score

    def _signature(self, own: Shingles) -> Any:
        signature = self._empty.copy()
        signature.update_batch(own)
        return signature


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
