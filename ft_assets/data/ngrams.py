"""Long prompts that stand inside a longer trained text: the share of a kept-out prompt's 13-grams that a row repeats.

Jaccard similarity (near.py) does not see a held-out text that is quoted in a long one. Runs of 13 words are what GPT-3's
and later models' contamination was measured with (Brown et al. 2020, appendix C). Grams that many rows share are
boilerplate and are left out; of a very long prompt a fixed number of grams is compared (those with the smallest hash:
the share stays unbiased, Broder 1997).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ft_assets.data.canonical import normalise
from ft_assets.data.near_duplicates import Match, boilerplate, in_order

WORDS = 13
LEAST = 5  # grams: a prompt with fewer is too short to say anything
MOST = 64  # grams of one prompt


def grams(row: dict[str, Any]) -> frozenset[int]:
    """Return the hashed runs of 13 words of all that a row says, answers included."""
    texts = [turn["content"] for turn in row["messages"]] + [
        row[key] for key in ("chosen", "rejected") if key in row
    ]
    return _grams("\n".join(texts))


def _grams(text: str) -> frozenset[int]:
    import xxhash

    words = normalise(text).split()
    return frozenset(
        xxhash.xxh3_64_intdigest(" ".join(words[index : index + WORDS]).encode())
        for index in range(len(words) - WORDS + 1)
    )


class GramIndex:
    """Finds the rows whose text, answers included, repeats a prompt of the rows given here."""

    def __init__(
        self, rows: Iterable[dict[str, Any]], share: float, common: frozenset[int]
    ) -> None:
        self.share = share
        self.owners: dict[int, list[str]] = {}
        self.counts: dict[str, int] = {}
        for row in rows:
            prompt = _grams(
                "\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "user")
            )
            own = sorted(prompt - common)[:MOST]
            if len(own) >= LEAST:
                self.counts[row["id"]] = len(own)
                for gram in own:
                    self.owners.setdefault(gram, []).append(row["id"])

    def __len__(self) -> int:
        return len(self.counts)

    def matches(self, rows: Iterable[dict[str, Any]]) -> Iterator[Match]:
        """Yield (id, id of the prompt that it repeats, share of that prompt's grams)."""
        for row in rows:
            hits = Counter(
                identity for gram in grams(row) for identity in self.owners.get(gram, ())
            )
            for identity, count in hits.items():
                if count / self.counts[identity] >= self.share:
                    yield row["id"], identity, count / self.counts[identity]


def contained(
    trained: Sequence[dict[str, Any]],
    kept_out: Sequence[dict[str, Any]],
    share: float,
    common: frozenset[int] | None = None,
) -> list[Match]:
    """Return (trained id, kept-out id, share of the kept-out prompt's 13-grams in the trained text)."""
    index = GramIndex(
        kept_out, share, boilerplate(trained, kept_out, of=grams) if common is None else common
    )
    return in_order(index.matches(trained)) if len(index) else []
