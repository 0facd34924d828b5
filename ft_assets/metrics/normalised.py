"""Metrics of an answer that is one number or one date, compared by value."""

from ft_assets.metrics.registry import Metric
from ft_assets.metrics.values import Kind, Values


@Metric("number", binary=True, any_reference=False, values=True)
def number(answers: list[str], references: list[str], values: Values) -> list[float]:
    """Score 1 if the whole answer is the reference's number: 1,234.50 is 1234.5."""
    return _same("number", answers, references, values)


@Metric("date", binary=True, any_reference=False, values=True, packages=("python-dateutil",))
def date(answers: list[str], references: list[str], values: Values) -> list[float]:
    """Score 1 if the whole answer is the reference's date: 27 Nov 2026 is 2026-11-27."""
    return _same("date", answers, references, values)


def _same(kind: Kind, answers: list[str], references: list[str], values: Values) -> list[float]:
    pairs = zip(answers, references, strict=True)
    return [float(values.same_kind(kind, answer, reference)) for answer, reference in pairs]
