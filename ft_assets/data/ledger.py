"""The token ledger of a side: how many rows and tokens, how many of them are supervised, and what a length limit costs."""

from array import array
from collections.abc import Sequence
from typing import Any

LIMITS = (512, 1024, 2048, 4096)
BINS = 40


class Ledger:
    """Counts sequences as they come; holds four bytes a sequence."""

    def __init__(self, max_length: int) -> None:
        self.max_length, self.lengths = max_length, array("I")
        self.tokens = self.supervised = self.too_long = self.zero_supervised = 0

    def fits(self, supervised: Sequence[bool]) -> bool:
        """Count a sequence, given its mask; return whether it may be trained on: a longer one is left out whole, as cutting
        would take its answer or end of turn."""
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

    def metrics(self) -> dict[str, Any]:
        """Return the numbers for the asset. Of a limit: how many sequences it leaves out."""
        if not self.lengths:
            return {}
        ordered = sorted(self.lengths)
        return {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "supervised_percent": round(100 * self.supervised / self.tokens, 2)
            if self.tokens
            else 0.0,
            "zero_supervised": self.zero_supervised,
            **{
                f"length_{name}": ordered[min(len(ordered) - 1, int(share * len(ordered)))]
                for name, share in QUANTILES.items()
            },
            "length_max": ordered[-1],
        }

    def histogram(self) -> dict[str, Any]:
        """Return {"edges", "counts", "limits"}: the lengths in equal bins, and what each limit leaves out and keeps."""
        top = max(self.lengths, default=0)
        width = max(1, -(-top // BINS))
        counts = [0] * (top // width + 1 if self.lengths else 0)
        for length in self.lengths:
            counts[length // width] += 1
        total = sum(self.lengths)
        limits = {}
        for limit in sorted({*LIMITS, self.max_length}):
            kept = [length for length in self.lengths if length <= limit]
            limits[str(limit)] = {
                "left_out": len(self.lengths) - len(kept),
                "tokens_percent": round(100 * sum(kept) / total, 1) if total else 0.0,
            }
        return {
            "edges": [width * number for number in range(len(counts) + 1)],
            "counts": counts,
            "limits": limits,
        }


QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}
