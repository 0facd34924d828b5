"""Exact match: of the stripped text, or of the JSON object that the task asks for."""

from ft_assets.metrics.json_object import parse_object, reference_objects
from ft_assets.metrics.registry import Metric
from ft_assets.metrics.values import Values


@Metric("exact", binary=True, config="json_fields", always=True, values=True)
def exact(
    answers: list[str], references: list[str], json_fields: list[str], values: Values
) -> list[float]:
    """Score 1 if the answer is the reference: as stripped text, or as JSON with `json_fields`."""
    pairs = zip(answers, references, strict=True)
    if not json_fields:
        return [float(answer.strip() == reference.strip()) for answer, reference in pairs]
    scores = []
    for answer, expected in zip(answers, reference_objects(references, json_fields), strict=True):
        given = parse_object(answer)
        scores.append(float(given is not None and values.same_json(given, expected)))
    return scores
