"""Task metrics: `evaluate` modules of this package, so that nothing is fetched from a hub."""

from ft_assets.evaluation.metrics.scores import retention_scores, score_answers

__all__ = ["retention_scores", "score_answers"]
