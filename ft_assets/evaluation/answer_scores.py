"""Score answers against references with the metrics of the evaluation's settings."""

from collections.abc import Iterable

import datasets
import evaluate

from ft_assets.config import EvaluationSettings
from ft_assets.metrics import Metric, Option, registered
from ft_assets.metrics.values import Values


class AnswerMetrics(evaluate.Metric):
    """Several metrics as one `evaluate` module.

    `compute` checks that answers and references are texts and equally many.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="One score for each row",
            citation="",
            inputs_description="texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        predictions: list[str],
        references: list[str],
        metrics: list[tuple[Metric, Option]],
        values: Values,
    ) -> dict[str, list[float]]:
        return {
            metric.name: metric.score(predictions, references, option, values)
            for metric, option in metrics
        }


def score_answers(
    answers: list[str],
    references: list[str],
    settings: EvaluationSettings,
    schema: Option = None,
    only: str | None = None,
) -> dict[str, list[float]]:
    """Return {metric: one score for each row} of the metrics of answers and references.

    schema: the parsed `evaluation.json_schema`. only: the one metric to compute. Raises
    EvaluationError if a reference does not fit the task.
    """
    chosen = [
        (metric, schema if metric.config == "json_schema" else settings.option(metric))
        for metric in settings.measured()
        if metric.of_answer and only in (None, metric.name)
    ]
    return _compute(answers, references, chosen, settings.values)


def retention_scores(answers: list[str], references: list[str], metric: str) -> list[float]:
    """Return the task score of general prompts, one for each row."""
    chosen = [(known, []) for known in registered() if known.name == metric]
    return _compute(answers, references, chosen, Values())[metric]


def _compute(
    answers: list[str],
    references: list[str],
    metrics: Iterable[tuple[Metric, Option]],
    values: Values,
) -> dict[str, list[float]]:
    module = AnswerMetrics(keep_in_memory=True)
    scores = module.compute(
        predictions=answers, references=references, metrics=list(metrics), values=values
    )
    return scores or {}
