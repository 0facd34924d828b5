"""Metric `regex`: the answer matches a regular expression."""

import re

from ft_assets.metrics.equality import composed
from ft_assets.metrics.registry import Metric


@Metric("regex", binary=True, needs_reference=False, config="regex")
def regex(answers: list[str], pattern: str) -> list[float]:
    """Score 1 if the whole stripped answer matches the pattern."""
    compiled = re.compile(composed(pattern))
    return [float(compiled.fullmatch(answer.strip()) is not None) for answer in answers]
