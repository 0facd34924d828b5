"""The interval of a gain over trainings with several seeds.

Another seed gives another model. The gain of one model says how good that model is; how good the
recipe is, and how much of the gain is luck, shows only in several trainings.
"""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t

from ft_assets.evaluation.report_model import Difference, SeedSpread


def seed_spread(gains: Sequence[float], rows: Difference, confidence: float) -> SeedSpread:
    """Return the mean gain with an interval that holds the variance of rows and of seeds.

    gains: of each seed, at least two. rows: the paired difference of each row's mean score over the
    seeds. The distances of two intervals from the mean are joined by their squares (MOVER: Zou and
    Donner 2008, Statistics in Medicine 27:1693): that over rows, and the t interval of the gains
    with k − 1 degrees of freedom.
    """
    deviation = statistics.stdev(gains)
    quantile = float(t.ppf((1 + confidence) / 2, len(gains) - 1))
    of_seeds = quantile * deviation / math.sqrt(len(gains))
    return SeedSpread(
        mean=rows.mean,
        low=rows.mean - math.hypot(rows.mean - rows.low, of_seeds),
        high=rows.mean + math.hypot(rows.high - rows.mean, of_seeds),
        gains=list(gains),
        deviation=deviation,
    )
