"""Score answers against references with the metrics that the task asks for."""

import json
from collections.abc import Mapping
from typing import Any

from ft_assets.config import EvaluationSettings
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.metrics.format import Label, Pattern, Schema, normal_label
from ft_assets.evaluation.metrics.json_object import JsonObject
from ft_assets.evaluation.metrics.text_exact import TextExact
from ft_assets.evaluation.metrics.text_overlap import Bleu, Chrf, Rouge

OVERLAP = {"rouge": Rouge, "bleu": Bleu, "chrf": Chrf}


def score_answers(
    answers: list[str],
    references: list[str],
    settings: EvaluationSettings,
    schema: Mapping[str, Any] | None = None,
) -> dict[str, list[float]]:
    """Return {metric: one score in [0, 1] a row}. Raises EvaluationError if a reference is not what the task says."""
    texts = {"predictions": answers, "references": references}
    if settings.json_fields:
        for index, reference in enumerate(references):
            check_reference(f"held-out row {index}", reference, settings.json_fields)
        scores = _of(JsonObject, texts, fields=settings.json_fields)
    else:
        scores = _of(TextExact, texts)
    if schema is not None:
        scores |= _of(Schema, texts, schema=schema)
    for name in settings.metrics:
        scores |= _of(OVERLAP[name], texts)
    if settings.regex:
        scores |= _of(Pattern, texts, pattern=settings.regex)
    if settings.labels:
        check_labels(references, settings.labels)
        scores |= _of(Label, texts, labels=settings.labels)
    return scores


def retention_scores(answers: list[str], references: list[str], metric: str) -> list[float]:
    """Return the task score of general prompts, one in [0, 1] a row."""
    kind = {"chrf": Chrf, "rougeL": Rouge, "exact": TextExact}[metric]
    return _of(kind, {"predictions": answers, "references": references})[metric]


def _of(kind: Any, texts: dict[str, list[str]], **options: Any) -> dict[str, list[float]]:
    return kind(keep_in_memory=True).compute(**texts, **options) or {}


def check_reference(where: str, reference: str, json_fields: list[str]) -> None:
    """Raise EvaluationError unless a reference is a JSON object with exactly the declared keys."""
    try:
        value = json.loads(reference)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict) or set(value) != set(json_fields):
        raise EvaluationError(
            where=where,
            found=f"the reference is {reference[:80]!r}",
            expected=f"a JSON object with the keys {', '.join(json_fields)}",
            fix="correct the data, or evaluation.json_fields",
        )


def check_labels(references: list[str], labels: list[str]) -> None:
    """Raise EvaluationError unless every reference is one of the labels."""
    known = {normal_label(label) for label in labels}
    for index, reference in enumerate(references):
        if normal_label(reference) not in known:
            raise EvaluationError(
                where=f"held-out row {index}",
                found=f"the reference is {reference[:80]!r}",
                expected=f"one of the {len(labels)} labels of evaluation.labels",
                fix="correct the data, or evaluation.labels",
            )
