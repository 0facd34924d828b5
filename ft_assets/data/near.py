"""Near-duplicate prompts between two sets of rows: MinHash LSH (datasketch) for candidates, exact Jaccard for the score.

A row is the set of word triples of what its user says (character 5-grams where words are few, as in Chinese). Triples
that many rows share are no sign of a copy but of a common instruction, and are left out.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ft_assets.data.canonical import normalise

PERMUTATIONS = 128
COMMON = 0.02  # share of all rows from which on a shingle is boilerplate
COMMON_LEAST = 5  # rows
SHORT = 5  # words below which characters are compared
SEED = 1

Match = tuple[str, str, float]


def near_duplicates(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]], threshold: float) -> list[Match]:
    """Return (left id, right id, Jaccard similarity ≥ threshold) for prompts that are nearly the same, the most alike first.

    Two prompts of nothing but boilerplate are compared whole.
    """
    from datasketch import MinHash, MinHashLSH

    if not left or not right:
        return []
    sets = _distinct([_shingles(row) for row in (*left, *right)])
    hashes = MinHash.bulk(([shingle.encode() for shingle in shingles] for shingles in sets), num_perm=PERMUTATIONS, seed=SEED)
    index = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=PERMUTATIONS)
    for number in range(len(left)):
        index.insert(number, hashes[number])
    found: dict[tuple[str, str], float] = {}
    for number, row in enumerate(right, start=len(left)):
        others: list[Any] = index.query(hashes[number])
        for other in others:
            score = len(sets[other] & sets[number]) / len(sets[other] | sets[number])
            if score >= threshold:
                found[(left[other]["id"], row["id"])] = score
    return sorted(((*pair, score) for pair, score in found.items()), key=lambda match: (-match[2], match[:2]))


def _shingles(row: dict[str, Any]) -> frozenset[str]:
    text = normalise("\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "user"))
    words = text.split()
    if len(words) < SHORT:
        return frozenset(text[index : index + 5] for index in range(max(1, len(text) - 4)))
    return frozenset(" ".join(words[index : index + 3]) for index in range(len(words) - 2))


def _distinct(sets: list[frozenset[str]]) -> list[frozenset[str]]:
    """Return the sets without the shingles that many rows share; a set that would be empty stays whole."""
    # Each kind of row once: many copies of one row would make its own words look like boilerplate.
    counts = Counter(shingle for shingles in set(sets) for shingle in shingles)
    limit = max(COMMON_LEAST, COMMON * len(sets))
    kept = [frozenset(shingle for shingle in shingles if counts[shingle] <= limit) for shingles in sets]
    return [few or whole for few, whole in zip(kept, sets, strict=True)]
