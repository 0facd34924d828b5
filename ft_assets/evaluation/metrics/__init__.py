"""Task metrics: `evaluate` modules of this package, so that nothing is fetched from a hub."""

from ft_assets.evaluation.metrics.scores import score_answers

__all__ = ["score_answers"]
