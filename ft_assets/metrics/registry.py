"""The descriptor of a metric, which registers the function that it decorates."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ft_assets.errors import EvaluationError
from ft_assets.metrics.equality import composed
from ft_assets.metrics.values import Values

Function = TypeVar("Function", bound=Callable[..., list[float]])
ROUNDING = 1e-6  # sacrebleu's best score is a rounding error off 1
Option = Any  # the value of one key of `evaluation:`; each metric's function has its real type


@dataclass(frozen=True)
class Metric:
    """The descriptor of a metric: one score for each row.

    name: the column of the score.
    higher_is_better: False for a loss.
    binary: each score is 0 or 1.
    bounded: each score is in [0, 1], and the best answer has 1 (0 if lower is better). False for a
    loss and for a user's own function.
    needs_reference: the function takes the references besides the answers.
    config: the key of `evaluation:` that switches the metric on; the function gets its value.
    entry: without `config`, the entry of `evaluation.metrics` that switches it on; by default the
    name.
    always: it is measured in any case.
    each: there is one such metric for each item of the list `config`; `{}` in the name is the item.
    of_answer: False if it needs more than answers and references: the model, the conversation or
    the base's answers. evaluation/scorer.py then computes it.
    any_reference: False if a reference must have a form, e.g. JSON.
    values: the function also gets the Values of `evaluation`: when two values are equal.
    packages: the distributions that compute it; their versions are in the report's fingerprint.
    """

    name: str
    higher_is_better: bool = True
    binary: bool = False
    bounded: bool = True
    needs_reference: bool = True
    config: str | None = None
    entry: str | None = None
    always: bool = False
    each: bool = False
    of_answer: bool = True
    any_reference: bool = True
    values: bool = False
    packages: tuple[str, ...] = ()
    function: Callable[..., list[float]] | None = None
    item: str | None = None

    def __call__(self, function: Function) -> Function:
        """Register the metric with its function."""
        assert self.name not in _METRICS, f"two metrics have the name {self.name}"
        _METRICS[self.name] = replace(self, function=function)
        return function

    def register(self) -> None:
        """Register a metric without a function: a forward pass of the model gives its scores."""
        _METRICS[self.name] = self

    def listed_as(self) -> str | None:
        """Return the entry of `evaluation.metrics` that switches the metric on, if one does."""
        return None if self.config or self.always else self.entry or self.name

    def for_item(self, item: str) -> "Metric":
        """Return the metric of one item of the list `config`."""
        return replace(self, name=self.name.format(item), item=item)

    def score(
        self, answers: list[str], references: list[str], option: Option, values: Values
    ) -> list[float]:
        """Score each answer, in NFC as its reference.

        Raises EvaluationError unless there is one score for each, in the declared range.
        """
        assert self.function is not None and self.of_answer, f"{self.name} needs more than texts"
        answers, references = (list(map(composed, texts)) for texts in (answers, references))
        texts = [answers, references] if self.needs_reference else [answers]
        options = [] if self.config is None else [self.item if self.each else option]
        scores = self.function(*texts, *options, *([values] if self.values else []))
        if len(scores) != len(answers):
            raise self._wrong(
                f"returned {len(scores)} scores for {len(answers)} answers",
                "one score for each answer",
            )
        outside = next((score for score in scores if not self._may_be(score)), None)
        if outside is not None:
            raise self._wrong(f"returned {outside}", "0 or 1" if self.binary else "0 to 1")
        return scores

    def _may_be(self, score: float) -> bool:
        if self.binary:
            return score in (0, 1)
        return 0 <= score <= 1 + ROUNDING if self.bounded else math.isfinite(score)

    def _wrong(self, found: str, expected: str) -> EvaluationError:
        where, fix = f"metric {self.name}", "correct the metric's function, or its descriptor"
        return EvaluationError(where=where, found=found, expected=expected, fix=fix)


_METRICS: dict[str, Metric] = {}


def registered() -> list[Metric]:
    """Return all metrics in the order of their registration."""
    return list(_METRICS.values())


def higher_is_better(name: str) -> bool:
    """Return False if the metric of this name is better when it is lower."""
    return name not in _METRICS or _METRICS[name].higher_is_better
