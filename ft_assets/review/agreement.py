"""Krippendorff's alpha of people who compare pairs, with a bootstrap interval over prompts.

Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section D: alpha = 1 - Do / De, of
coincidences o between the values of different people in one unit. It allows missing judgements.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from ft_assets.evaluation.report_model import Agreement

Values = np.ndarray
DRAWS = 2000
OUTCOMES = 3  # worse, tie, better: ordinal, because a tie is closer to either than they are


def coincidences(values: Sequence[int], categories: int) -> Values:
    """Return the coincidence matrix of one unit, [categories, categories], from its values."""
    counts = np.bincount(np.asarray(values, dtype=int), minlength=categories).astype(float)
    if counts.sum() < 2:
        return np.zeros((categories, categories))
    return (np.outer(counts, counts) - np.diag(counts)) / (counts.sum() - 1)


def alpha(matrices: Values) -> Values:
    """Return the ordinal alpha of coincidence matrices, [..., c, c] → [...].

    NaN where all values are equal: agreement by chance is complete then.
    """
    marginals = matrices.sum(-1)
    delta, total = _ordinal(marginals), marginals.sum(-1)
    expected = (marginals[..., :, None] * marginals[..., None, :] * delta).sum((-1, -2))
    observed = (matrices * delta).sum((-1, -2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - (total - 1) * observed / expected


def _ordinal(marginals: Values) -> Values:
    """Return the squared ordinal distances: ranks between two values, each counted by its half."""
    between = np.cumsum(marginals, -1) - marginals / 2
    return (between[..., :, None] - between[..., None, :]) ** 2


def agreement(
    units: Mapping[str, Sequence[Sequence[int]]], confidence: float, seed: int
) -> Agreement | None:
    """Return the agreement on pairs; None if no unit has two values, or all are ties.

    units: by prompt group, each unit with the values -1, 0 or 1 of different people. Which answer
    of a pair is the first means nothing, so that each unit counts in both directions.
    """
    matrices = [
        sum((_both_ways(unit) for unit in its), np.zeros((OUTCOMES, OUTCOMES)))
        for its in units.values()
    ]
    matrices = np.array([one for one in matrices if one.any()])
    pairs = sum(len(unit) > 1 for its in units.values() for unit in its)
    if not len(matrices) or np.isnan(point := float(alpha(matrices.sum(0)))):
        return None
    low, high = _interval(matrices, point, confidence, seed)
    return Agreement(alpha=point, low=low, high=high, pairs=pairs, prompts=len(matrices))


def _both_ways(unit: Sequence[int]) -> Values:
    one = coincidences([value + 1 for value in unit], OUTCOMES)
    return (one + one[::-1, ::-1]) / 2


def _interval(matrices: Values, point: float, confidence: float, seed: int) -> tuple[float, float]:
    """Return the percentile interval over draws of prompt groups, widened for few of them.

    The tail is that of Student's t with n - 1 degrees, because a draw has less spread than the
    groups by (n - 1) / n (Hesterberg 2015, Am Stat 69:371, section 5.3).
    Complete agreement shows only that disagreement is rare: a share q of groups that disagree as
    far as possible is missing from n groups with probability (1 - q)^n.
    """
    count, tail = len(matrices), (1 - confidence) / 2
    if np.isclose(point, 1.0):
        missed = 1 - tail ** (1 / count)
        reverse = np.fliplr(np.diag(matrices.sum(0).sum(-1)))
        return float(alpha((1 - missed) * matrices.sum(0) + missed * reverse)), 1.0
    if count < 2:
        return -1.0, 1.0
    tail = float(norm.cdf(student.ppf(tail, count - 1) * math.sqrt(count / (count - 1))))
    chance = np.random.default_rng(seed)
    weights = chance.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    drawn = alpha(np.tensordot(weights, matrices, 1))
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
