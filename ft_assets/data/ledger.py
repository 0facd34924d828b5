"""Count the rows and tokens of a side, the supervised tokens, and the cost of a length limit."""

from array import array
from collections.abc import Sequence
from typing import TypedDict

LIMITS = (512, 1024, 2048, 4096)
BINS = 40
QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}


class LimitCost(TypedDict):
    """Sequences that a length limit filters, and the percentage of tokens that it keeps."""

    left_out: int
    tokens_percent: float


class Histogram(TypedDict):
    """Lengths in equal bins (one edge more than counts), and the cost of each limit."""

    edges: list[int]
    counts: list[int]
    limits: dict[str, LimitCost]


class Ledger:
    """Counts sequences one by one; keeps four bytes a sequence in memory."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.lengths = array("I")
        self.tokens = 0
        self.supervised = 0
        self.too_long = 0
        self.zero_supervised = 0

    def fits(self, supervised: Sequence[bool]) -> bool:
        """Count a sequence by its mask. Return True if it can be trained on.

        A sequence that is too long is filtered as a whole: cutting it would remove its answer or
        its end of turn.
        """
        self.lengths.append(len(supervised))
        if len(supervised) > self.max_length:
            self.too_long += 1
            return False
        trained = sum(supervised)
        if not trained:
            self.zero_supervised += 1
            return False
        self.tokens += len(supervised)
        self.supervised += trained
        return True

    def metrics(self) -> dict[str, int | float]:
        """Return the numbers for the asset."""
        if not self.lengths:
            return {}
        ordered = sorted(self.lengths)
        return {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "supervised_percent": _percent(self.supervised, self.tokens, 2),
            "zero_supervised": self.zero_supervised,
            **{
                f"length_{name}": ordered[min(len(ordered) - 1, int(share * len(ordered)))]
                for name, share in QUANTILES.items()
            },
            "length_max": ordered[-1],
        }

    def histogram(self) -> Histogram:
        """Return the lengths in bins, and the cost of each limit."""
        top = max(self.lengths, default=0)
        width = max(1, -(-top // BINS))
        counts = [0] * (top // width + 1 if self.lengths else 0)
        for length in self.lengths:
            counts[length // width] += 1
        total = sum(self.lengths)
        limits: dict[str, LimitCost] = {}
        for limit in sorted({*LIMITS, self.max_length}):
            kept = [length for length in self.lengths if length <= limit]
            limits[str(limit)] = {
                "left_out": len(self.lengths) - len(kept),
                "tokens_percent": _percent(sum(kept), total, 1),
            }
        return {
            "edges": [width * number for number in range(len(counts) + 1)],
            "counts": counts,
            "limits": limits,
        }


def _percent(part: int, total: int, digits: int) -> float:
    return round(100 * part / total, digits) if total else 0.0
