"""Paired statistics of two candidates on the same rows, by scipy and statsmodels.

Every difference is oriented so that more is better: for a loss it is rival − candidate.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom
from scipy.stats import t as student
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import normal_sample_size_one_tail

from ft_assets.evaluation.report_model import Difference
from ft_assets.evaluation.verdict import intervals
from ft_assets.evaluation.verdict.groups import Groups, Values
from ft_assets.evaluation.verdict.intervals import DRAWS, MANY, Interval, batch_rows

POWER = 0.8
LEAST_P = 1e-300  # exp() of a smaller one is 0, which no test shows
ALL_SIGNS = 13  # groups, up to which every combination of signs is tried
MANY_ROWS = 2000  # beyond, the number of rows needed is that of the normal approximation


def interval(
    values: Sequence[float],
    confidence: float,
    seed: int,
    groups: Sequence[str] | None = None,
    bounded: bool = True,
) -> Interval:
    """Return the confidence interval of the mean of one candidate's scores.

    groups: the key of each row's group. bounded: the scores are in [0, 1].
    """
    scores = np.asarray(values, dtype=float)
    rows = Groups.of(groups, len(scores))
    if set(values) <= {0.0, 1.0}:
        return intervals.share(float(scores.sum()), rows, scores, confidence)
    spread = float(np.ptp(scores)) or 1.0
    bounds = (0.0, 1.0) if bounded else (float(scores.min()) - spread, float(scores.max()) + spread)
    return intervals.graded_mean(scores, rows, confidence, seed, bounds)


def compare(
    candidate: Sequence[float],
    rival: Sequence[float],
    confidence: float,
    seed: int,
    lower_is_better: bool = False,
    groups: Sequence[str] | None = None,
    bounded: bool = True,
) -> Difference:
    """Return the paired difference of two candidates, row by row.

    groups: the key of each row's group; rows of one group do not count as independent. bounded: the
    scores are in [0, 1]. The interval is Tango's score interval if all scores are 0 or 1, else
    bootstrap-t. p is that of McNemar's exact test for 0/1 scores of ungrouped rows, else of a test
    that flips the signs of whole groups.
    """
    sign = -1.0 if lower_is_better else 1.0
    left, right = np.asarray(candidate, dtype=float), np.asarray(rival, dtype=float)
    differences = sign * (left - right)
    rows = Groups.of(groups, len(differences))
    binary = bool(np.isin(left, (0, 1)).all() and np.isin(right, (0, 1)).all())
    if binary:
        low, high = intervals.paired_share(differences, rows, confidence)
    else:
        bounds = _bounds(left, right, bounded)
        low, high = intervals.graded_mean(differences, rows, confidence, seed, bounds)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    exact = binary and rows.alone
    correlation = rows.correlation(differences)
    effect = rows.design_effect(correlation)
    mean = float(differences.mean())
    return Difference(
        mean=mean,
        low=low,
        high=high,
        wins=wins,
        losses=losses,
        ties=len(differences) - wins - losses,
        n=len(differences),
        test="McNemar" if exact else "permutation",
        p=_mcnemar(wins, losses) if exact else _sign_flips(rows.sums(differences), seed),
        detectable=_detectable(differences, effect, binary, 1 - confidence),
        rows_needed=_rows_needed(differences, effect, binary, 1 - confidence),
        graded=not binary,
        groups=rows.count,
        correlation=None if rows.alone else correlation,
        effective_n=len(differences) / effect,
    )


def _bounds(left: Values, right: Values, bounded: bool) -> Interval:
    """Return the least and the largest difference that is taken as possible.

    A metric without bounds has those of the scores that were observed.
    """
    if bounded:
        return -1.0, 1.0
    spread = float(np.ptp(np.concatenate([left, right]))) or 1.0
    return -spread, spread


def _mcnemar(wins: int, losses: int) -> float:
    result: Any = mcnemar([[0, wins], [losses, 0]], exact=True) if wins + losses else None
    return float(result.pvalue) if result is not None else 1.0


def _sign_flips(sums: Values, seed: int) -> float:
    """Return the two-sided p-value of the sum under random signs of the groups.

    Under no difference each sign of a group's sum is as likely as the other. A p-value that the
    draws cannot resolve is Hoeffding's bound 2 exp(-z²/2) with z = Σs / √Σs², which holds for
    random signs (1963, JASA 58:13).
    """
    if not sums.any():
        return 1.0
    observed = abs(float(sums.sum())) * (1 - 1e-12)
    if len(sums) <= ALL_SIGNS:
        return float((np.abs(_all_signs(len(sums)) @ sums) >= observed).mean())
    extreme = sum(
        int((np.abs(signs.astype(np.float64) @ sums) >= observed).sum())
        for signs in _random_signs(len(sums), seed)
    )
    if extreme:
        return (extreme + 1) / (DRAWS + 1)
    bound = 2 * math.exp(-(observed**2) / float((sums**2).sum()) / 2)
    return max(min(1 / (DRAWS + 1), bound), LEAST_P)


def _random_signs(count: int, seed: int) -> Iterator[Values]:
    """Yield the draws of signs in batches. Those of many groups are drawn again at each call."""
    if count > MANY:
        yield from _draw_signs(count, seed)
    else:
        yield from _kept_signs(count, seed)


@lru_cache(maxsize=2)
def _kept_signs(count: int, seed: int) -> list[Values]:
    return list(_draw_signs(count, seed))


def _draw_signs(count: int, seed: int) -> Iterator[Values]:
    chance, rows = np.random.default_rng(seed), batch_rows(count)
    for begin in range(0, DRAWS, rows):
        size = (min(rows, DRAWS - begin), count)
        yield chance.integers(0, 2, size=size, dtype=np.int8) * 2 - 1


def _all_signs(count: int) -> Values:
    numbers = np.arange(2**count)[:, None]
    return (numbers >> np.arange(count) & 1) * 2 - 1


def _detectable(differences: Values, effect: float, binary: bool, alpha: float) -> float | None:
    """Return the difference that the test finds with a power of 80 % in as many effective rows."""
    n, deviation = len(differences) / effect, float(np.std(differences))
    if n < 5 or deviation == 0.0:
        return None
    if not binary:
        quantiles = student.ppf([1 - alpha / 2, POWER], n - 1)
        return deviation * float(quantiles.sum()) / math.sqrt(n)
    rows, discordant = math.floor(n), float((differences != 0).mean())
    if mcnemar_power(rows, discordant, 1.0, alpha) < POWER:
        return None

    def missing(difference: float) -> float:
        return mcnemar_power(rows, discordant, difference, alpha) - POWER

    return float(brentq(missing, 0.0, 1.0))  # pyright: ignore[reportArgumentType]


def mcnemar_power(n: int, discordant: float, difference: float, alpha: float) -> float:
    """Return the power of McNemar's exact two-sided test to find a better candidate.

    n: pairs. discordant: the share of pairs that disagree, at least the difference. difference: the
    true difference of the two shares. The power is averaged over the number of disagreeing pairs
    (Duffy 1984, Biometrics 40:1005).
    """
    discordant = max(discordant, difference)
    if discordant <= 0:
        return 0.0
    pairs = np.arange(n + 1)
    if n > MANY_ROWS:  # the other numbers of disagreeing pairs have no probability
        pairs = pairs[np.abs(pairs - n * discordant) <= 9 * math.sqrt(n * discordant) + 9]
    largest = binom.ppf(
        alpha / 2, pairs, 0.5
    )  # smallest k with P(losses ≤ k) ≥ α/2; one less rejects unless it is exact
    largest = np.where(binom.cdf(largest, pairs, 0.5) <= alpha / 2, largest, largest - 1)
    found = binom.cdf(largest, pairs, (1 - difference / discordant) / 2)
    return float(np.sum(binom.pmf(pairs, n, discordant) * found))


def _rows_needed(differences: Values, effect: float, binary: bool, alpha: float) -> int | None:
    """Return the rows in which the same test finds the observed difference with a power of 80 %.

    None if nothing differs.
    """
    mean, deviation = abs(float(differences.mean())), float(np.std(differences))
    if mean == 0.0 or deviation == 0.0:
        return None
    needed: Any = normal_sample_size_one_tail(mean, POWER, alpha / 2, std_null=deviation)
    if binary and needed <= MANY_ROWS:
        discordant = float((differences != 0).mean())
        needed = _smallest(lambda n: mcnemar_power(n, discordant, mean, alpha) >= POWER)
    return math.ceil(needed * effect)


def _smallest(enough: Callable[[int], bool]) -> int:
    """Return the smallest number that is enough, by doubling and halving."""
    high = 2
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
