"""Score answers against references with the metrics that the task asks for."""

import json

from ft_assets.errors import EvaluationError
from ft_assets.evaluation.metrics.json_object import JsonObject
from ft_assets.evaluation.metrics.text_exact import TextExact


def score_answers(answers: list[str], references: list[str], json_fields: list[str]) -> dict[str, list[float]]:
    """Return {metric: one score in [0, 1] a row}. Raises EvaluationError if a reference is not what the task says."""
    if not json_fields:
        return TextExact(keep_in_memory=True).compute(predictions=answers, references=references) or {}
    for index, reference in enumerate(references):
        check_reference(f"held-out row {index}", reference, json_fields)
    return JsonObject(keep_in_memory=True).compute(predictions=answers, references=references, fields=json_fields) or {}


def check_reference(where: str, reference: str, json_fields: list[str]) -> None:
    """Raise EvaluationError unless a reference is a JSON object with exactly the declared keys."""
    try:
        value = json.loads(reference)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict) or set(value) != set(json_fields):
        raise EvaluationError(
            where,
            f"the reference is {reference[:80]!r}",
            f"a JSON object with the keys {', '.join(json_fields)}",
            "correct the data, or evaluation.json_fields",
        )
