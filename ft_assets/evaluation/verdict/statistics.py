"""Paired statistics of two candidates on the same rows, by scipy and statsmodels.

Every difference is oriented so that more is better: for a loss it is rival − candidate.
"""

import math
import statistics as stats
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, bootstrap, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower, normal_sample_size_one_tail

from ft_assets.evaluation.report_model import Difference

POWER = 0.8
DRAWS = 9999


def interval(values: list[float], confidence: float, seed: int) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean, of 9,999 draws.

    If all values are equal, it is that value.
    """
    if len(set(values)) <= 1:
        return values[0], values[0]
    result = bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=confidence,
        n_resamples=DRAWS,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def compare(
    candidate: list[float],
    rival: list[float],
    confidence: float,
    seed: int,
    lower_is_better: bool = False,
) -> Difference:
    """Return the paired difference of two candidates, row by row.

    The interval is the bootstrap interval of the mean. p is that of McNemar's exact test if all
    scores are 0 or 1, else of a sign-flip permutation test of the mean.
    """
    sign = -1.0 if lower_is_better else 1.0
    differences = [sign * (left - right) for left, right in zip(candidate, rival, strict=True)]
    low, high = interval(differences, confidence, seed)
    mean = stats.fmean(differences)
    wins = sum(value > 0 for value in differences)
    losses = sum(value < 0 for value in differences)
    binary = set(candidate) | set(rival) <= {0.0, 1.0}
    return Difference(
        mean=mean,
        low=low,
        high=high,
        wins=wins,
        losses=losses,
        ties=len(differences) - wins - losses,
        n=len(differences),
        test="McNemar" if binary else "permutation",
        p=_mcnemar(wins, losses) if binary else _permutation(differences, seed),
        detectable=_detectable(differences, binary, 1 - confidence),
        rows_needed=_rows_needed(mean, differences, 1 - confidence),
    )


def _mcnemar(wins: int, losses: int) -> float:
    result: Any = mcnemar([[0, wins], [losses, 0]], exact=True) if wins + losses else None
    return float(result.pvalue) if result is not None else 1.0


def _permutation(differences: list[float], seed: int) -> float:
    if not any(differences):
        return 1.0
    # Paired samples: under no difference each sign is as likely as the other.
    result: Any = permutation_test(
        (np.asarray(differences),),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=DRAWS,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _detectable(differences: list[float], binary: bool, alpha: float) -> float | None:
    n, deviation = len(differences), float(np.std(differences))
    if n < 5 or deviation == 0.0:
        return None
    if not binary:
        effect: Any = TTestPower().solve_power(nobs=n, alpha=alpha, power=POWER)
        return float(deviation * effect)
    discordant = sum(value != 0 for value in differences) / n
    if mcnemar_power(n, discordant, 1.0, alpha) < POWER:
        return None

    def missing(difference: float) -> float:
        return mcnemar_power(n, discordant, difference, alpha) - POWER

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
    largest = binom.ppf(
        alpha / 2, pairs, 0.5
    )  # smallest k with P(losses ≤ k) ≥ α/2; one less rejects unless it is exact
    largest = np.where(binom.cdf(largest, pairs, 0.5) <= alpha / 2, largest, largest - 1)
    found = binom.cdf(largest, pairs, (1 - difference / discordant) / 2)
    return float(np.sum(binom.pmf(pairs, n, discordant) * found))


def _rows_needed(mean: float, differences: list[float], alpha: float) -> int | None:
    deviation = float(np.std(differences))
    if mean == 0.0 or deviation == 0.0:
        return None
    return math.ceil(normal_sample_size_one_tail(abs(mean), POWER, alpha / 2, std_null=deviation))
