"""Metrics of the reference answer under the model: its loss in nats per token, and the share of its
tokens that are the most likely ones. inference/losses.py computes both in one forward pass."""

from ft_assets.metrics.registry import Metric

Metric("loss", higher_is_better=False, bounded=False, always=True, of_answer=False).register()
Metric("token_accuracy", always=True, of_answer=False).register()
