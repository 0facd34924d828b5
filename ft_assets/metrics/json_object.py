"""Metrics of an answer that must be one strict JSON object with the keys of `json_fields`."""

import json

from ft_assets.errors import EvaluationError
from ft_assets.metrics.registry import Metric
from ft_assets.rows.types import Json, JsonObject


@Metric("valid_json", binary=True, needs_reference=False, config="json_fields")
def valid_json(answers: list[str], json_fields: list[str]) -> list[float]:
    """Score 1 if the whole answer is a JSON object with exactly these keys."""
    parsed = [parse_object(answer) for answer in answers]
    return [float(given is not None and set(given) == set(json_fields)) for given in parsed]


@Metric("field_f1", config="json_fields")
def field_f1(answers: list[str], references: list[str], json_fields: list[str]) -> list[float]:
    """Score 2·right / (fields given + fields expected); right: keys with the expected value."""
    scores = []
    for answer, expected in zip(answers, reference_objects(references, json_fields), strict=True):
        given = parse_object(answer)
        right = len(right_fields(given, expected))
        scores.append(2 * right / (len(given or {}) + len(json_fields)))
    return scores


@Metric("field_{}", binary=True, config="json_fields", each=True)
def field(answers: list[str], references: list[str], name: str) -> list[float]:
    """Score 1 if one field of the object has the expected value."""
    pairs = zip(answers, map(json.loads, references), strict=True)
    return [
        float(name in right_fields(parse_object(answer), expected)) for answer, expected in pairs
    ]


def parse_json(text: str) -> tuple[bool, Json]:
    """Return (True, value) if the whole text is strict JSON, else (False, None).

    Text around the JSON, a code fence or NaN is invalid.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return True, json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False, None


def parse_object(text: str) -> JsonObject | None:
    """Return the object if the whole text is one strict JSON object, else None."""
    _, value = parse_json(text)
    return value if isinstance(value, dict) else None


def right_fields(given: JsonObject | None, expected: JsonObject) -> set[str]:
    """Return the keys of `expected` that the answer gives with the same value and type."""
    return {
        name
        for name, value in expected.items()
        if given is not None
        and name in given
        and type(given[name]) is type(value)
        and given[name] == value
    }


def reference_objects(references: list[str], json_fields: list[str]) -> list[JsonObject]:
    """Parse the references. Raises EvaluationError unless each is an object with these keys."""
    objects = []
    for index, reference in enumerate(references):
        try:
            value = json.loads(reference)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict) or set(value) != set(json_fields):
            raise EvaluationError(
                where=f"held-out row {index}",
                found=f"the reference is {reference[:80]!r}",
                expected=f"a JSON object with the keys {', '.join(json_fields)}",
                fix="correct the data, or evaluation.json_fields",
            )
        objects.append(value)
    return objects
