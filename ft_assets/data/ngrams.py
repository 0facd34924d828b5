"""Find long prompts that are quoted in a longer trained text.

The score is the share of a held-out prompt's 13-grams that a row repeats. Jaccard similarity
(near_duplicates.py) does not see a held-out text that a long text quotes. The contamination of
GPT-3 and later models was measured with runs of 13 words (Brown et al. 2020, appendix C). Grams
that many rows share are boilerplate and are filtered. Of a very long prompt a fixed number of
grams is compared, those with the smallest hash: the share stays unbiased (Broder 1997).
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from ft_assets.data.near_duplicates import Match
from ft_assets.data.units import normalise
from ft_assets.rows.types import TextRow

WORDS = 13
MIN_GRAMS = 5  # of a prompt: a shorter one shows nothing
MAX_GRAMS = 64  # of a prompt


def grams(row: TextRow) -> frozenset[int]:
    """Return the hashed runs of 13 words of all texts of a row, answers included."""
    texts = [turn["content"] for turn in row["messages"]]
    if "chosen" in row:
        texts.append(row["chosen"])
    if "rejected" in row:
        texts.append(row["rejected"])
    return _grams("\n".join(texts))


def _grams(text: str) -> frozenset[int]:
    import xxhash

    words = normalise(text).split()
    return frozenset(
        xxhash.xxh3_64_intdigest(" ".join(words[index : index + WORDS]).encode())
        for index in range(len(words) - WORDS + 1)
    )


class GramIndex:
    """Finds the rows whose text, answers included, repeats a prompt of the indexed rows."""

    def __init__(self, rows: Iterable[TextRow], share: float, common: frozenset[int]) -> None:
        self.share = share
        self.owners: dict[int, list[str]] = {}
        self.counts: dict[str, int] = {}
        for row in rows:
            user = (turn["content"] for turn in row["messages"] if turn["role"] == "user")
            own = sorted(_grams("\n".join(user)) - common)[:MAX_GRAMS]
            if len(own) >= MIN_GRAMS:
                self.counts[row["id"]] = len(own)
                for gram in own:
                    self.owners.setdefault(gram, []).append(row["id"])

    def __len__(self) -> int:
        return len(self.counts)

    def matches(self, rows: Iterable[TextRow]) -> Iterator[Match]:
        """Yield (id, id of the prompt that the row repeats, share of that prompt's grams)."""
        for row in rows:
            hits = Counter(
                identity for gram in grams(row) for identity in self.owners.get(gram, ())
            )
            for identity, count in hits.items():
                if count / self.counts[identity] >= self.share:
                    yield row["id"], identity, count / self.counts[identity]
