"""Confidence intervals that cover their truth on few, skewed, grouped and one-sided scores.

bench/verdict.py measures the coverage of each. A percentile bootstrap is not among them: of scores
that can only lose it covers far less than it promises, and of equal scores it makes a point.
"""

from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, skew
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint

from ft_assets.evaluation.verdict.groups import Groups, Values

DRAWS = 9999
MANY = 4000  # groups, above which fewer draws are as good
BATCH = 1000  # draws that are in memory as floats at once
BATCH_VALUES = 400_000  # of many groups: 3 MB, which a processor's cache holds
TAIL = 10  # draws beyond a quantile; a rarer quantile is extended from there
LEAST_ERROR = 0.1  # of a draw's standard error, as a share of the sample's
SCORE_TAIL = 0.8  # share of 1 - confidence that the score interval uses

Interval = tuple[float, float]


def share(successes: float, groups: Groups, values: Values, confidence: float) -> Interval:
    """Return the Clopper–Pearson interval of a share, with counts of effective rows.

    Wilson's interval is narrower, and covers a share near 0 or 1 in only 84 % of 20 rows.
    """
    effect = groups.design_effect(groups.cautious_correlation(values))
    low, high = proportion_confint(
        successes / effect, len(values) / effect, alpha=1 - confidence, method="beta"
    )
    return float(np.nan_to_num(low, nan=0.0)), float(np.nan_to_num(high, nan=1.0))


def paired_share(differences: Values, groups: Groups, confidence: float) -> Interval:
    """Return the score interval of a paired difference of 0/1 scores (Tango 1998, Stat Med 17:891).

    Counts are of effective rows (Rao and Scott 1992, Biometrics 48:577), with Student's quantile if
    rows are grouped. If all disagreements go in one direction, the plain interval covers 93 %
    instead of 95 %, so it is computed at 1 - 0.8 (1 - confidence).
    """
    effect = groups.design_effect(groups.cautious_correlation(differences))
    rows = len(differences) / effect
    wins, losses = ((differences > 0).sum() / effect, (differences < 0).sum() / effect)
    level = 1 - SCORE_TAIL * (1 - confidence) / 2
    quantile = norm.ppf(level) if groups.alone else student.ppf(level, max(groups.count - 1, 1))
    low = _score_limit(wins, losses, rows, float(quantile))
    return low, -_score_limit(losses, wins, rows, float(quantile))


def _score_limit(wins: float, losses: float, rows: float, quantile: float) -> float:
    """Return the smallest difference that the score test does not reject."""
    observed = (wins - losses) / rows

    def excess(difference: float) -> float:
        return _score(wins, losses, rows, difference) - quantile

    if observed <= -1.0 or excess(-1.0 + 1e-9) <= 0:
        return -1.0
    return float(brentq(excess, -1.0 + 1e-9, observed))  # pyright: ignore[reportArgumentType]


def _score(wins: float, losses: float, rows: float, difference: float) -> float:
    """Return Tango's score statistic of a true difference of two paired shares."""
    linear = -wins - losses + (2 * rows - wins + losses) * difference
    constant = -losses * difference * (1 - difference)
    root = np.sqrt(max(linear**2 - 8 * rows * constant, 0.0))
    lost = (root - linear) / (4 * rows)  # the likeliest share of losses under this difference
    variance = rows * (2 * lost + difference * (1 - difference))
    return float((wins - losses - rows * difference) / np.sqrt(max(variance, 1e-300)))


def graded_mean(
    values: Values, groups: Groups, confidence: float, seed: int, bounds: Interval
) -> Interval:
    """Return the bootstrap-t interval of a mean, of whole groups, within `bounds`.

    The level follows the skewness g of the groups: 1 - confidence is divided by
    1 + g² (1 + 50 / groups). A plain bootstrap-t of lognormal values misses the mean in 8 % of 40
    rows on one side, instead of 2.5 %. Symmetric values keep their width but for 2 to 5 %.
    Equal values show only that other values are rare: see `_unseen`.
    """
    mean = float(values.mean())
    sizes = groups.sizes.astype(float)
    residuals = groups.sums(values) - mean * sizes
    error = _standard_error(residuals, groups)
    if groups.count < 2 or error <= 1e-12 * max(1.0, abs(mean)):
        return _unseen(mean, groups.count, confidence, bounds)
    skewness = float(skew(residuals))
    tail = (1 - confidence) / (1 + skewness**2 * (1 + 50 / groups.count)) / 2
    studentized = np.sort(_studentized(residuals, sizes, error, seed))
    low = mean - _quantile(studentized, tail, upper=True) * error
    high = mean - _quantile(studentized, tail, upper=False) * error
    return max(low, bounds[0]), min(high, bounds[1])


def _standard_error(residuals: Values, groups: Groups) -> float:
    if groups.count < 2:
        return 0.0
    variance = float((residuals**2).sum()) * groups.count / (groups.count - 1)
    return float(np.sqrt(variance)) / len(groups.index)


def _unseen(mean: float, groups: int, confidence: float, bounds: Interval) -> Interval:
    """Return the interval of a mean of equal values.

    A share q of other groups, each as far away as the bounds allow, is missing from n groups with
    probability (1 - q)^n.
    """
    missed = 1 - ((1 - confidence) / 2) ** (1 / groups)
    return mean - missed * (mean - bounds[0]), mean + missed * (bounds[1] - mean)


def _studentized(residuals: Values, sizes: Values, error: float, seed: int) -> Values:
    """Return (mean* - mean) / error* of each draw of whole groups.

    A draw without spread has the least error instead of none, so that it is a wide tail and not a
    division by zero.
    """
    count = len(residuals)
    columns = np.stack([residuals, sizes, residuals**2, residuals * sizes, sizes**2], axis=1)
    result = []
    weights, batch = _draws(count, seed), batch_rows(count)
    for begin in range(0, len(weights), batch):
        total, rows, squares, cross, squared_sizes = (
            weights[begin : begin + batch].astype(np.float64) @ columns
        ).T
        shift = total / rows
        spread = np.maximum(squares - 2 * shift * cross + shift**2 * squared_sizes, 0.0)
        errors = np.sqrt(spread * count / (count - 1)) / rows
        result.append(shift / np.maximum(errors, LEAST_ERROR * error))
    return np.concatenate(result)


def batch_rows(count: int) -> int:
    """Return the draws of `count` groups that are in memory at once, a multiple of 4.

    numpy takes four signs from one random word, so that batches draw what one call would.
    """
    return BATCH if count <= MANY else max(4, BATCH_VALUES // count // 4 * 4)


@lru_cache(maxsize=2)
def _draws(count: int, seed: int) -> Values:
    """Return how often each draw takes each of `count` groups."""
    draws = DRAWS if count <= MANY else DRAWS // 5
    chance = np.random.default_rng(seed)
    shares, batch = np.full(count, 1 / count), batch_rows(count)
    return np.concatenate(
        [
            chance.multinomial(count, shares, size=min(batch, draws - begin)).astype(np.uint8)
            for begin in range(0, draws, batch)
        ]
    )


def _quantile(ordered: Values, tail: float, upper: bool) -> float:
    """Return the quantile with this tail; one beyond the draws grows as the normal's does."""
    shown = max(tail, TAIL / len(ordered))
    value = float(np.quantile(ordered, 1 - shown if upper else shown))
    return value * float(norm.isf(tail) / norm.isf(shown))
