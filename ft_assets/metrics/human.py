"""Metric `human`: people compare an answer with the base's, without the names (ft review).

1 where they prefer the answer, 0 where they prefer the base's, ½ for a tie; the mean over several
people. The base's own score is ½ by definition. review/win_rates.py computes it.
"""

from ft_assets.metrics.registry import Metric

Metric("human", needs_reference=False, of_answer=False).register()
