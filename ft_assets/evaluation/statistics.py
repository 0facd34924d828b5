"""Paired statistics of two candidates on the same rows, by scipy and statsmodels."""

import math
import statistics as stats
from typing import Any

import numpy as np
from scipy.stats import bootstrap, norm
from statsmodels.stats.contingency_tables import mcnemar


def interval(values: list[float], confidence: float, seed: int) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean (10,000 draws; the point itself if all values are equal)."""
    if len(set(values)) <= 1:
        return values[0], values[0]
    result = bootstrap(
        (np.asarray(values),), np.mean, confidence_level=confidence, n_resamples=9999, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def compare(candidate: list[float], rival: list[float], confidence: float, seed: int) -> dict[str, Any]:
    """Return the paired difference candidate − rival: mean, interval, wins/ties/losses and, for 0/1 scores, McNemar's exact p.

    `rows_needed` is the n at which the observed mean difference would be significant, (z·s/mean)² (normal
    approximation), or None if there is no difference to find.
    """
    differences = [left - right for left, right in zip(candidate, rival, strict=True)]
    low, high = interval(differences, confidence, seed)
    mean = stats.fmean(differences)
    wins, losses = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    p = None
    if set(candidate) | set(rival) <= {0.0, 1.0}:
        table: Any = mcnemar([[0, wins], [losses, 0]], exact=True) if wins + losses else None
        p = float(table.pvalue) if table is not None else 1.0
    deviation = stats.stdev(differences) if len(differences) > 1 else 0.0
    z = float(norm.ppf(0.5 + confidence / 2))
    needed = math.ceil((z * deviation / mean) ** 2) if mean and deviation else None
    return {
        "mean": mean, "low": low, "high": high, "wins": wins, "losses": losses,
        "ties": len(differences) - wins - losses, "p_mcnemar": p, "n": len(differences), "rows_needed": needed,
    }  # fmt: skip
