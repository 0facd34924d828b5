"""Metrics of an answer that must be one strict JSON object with the keys of `json_fields`."""

import json
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from ft_assets.errors import EvaluationError
from ft_assets.metrics.equality import composed
from ft_assets.metrics.registry import Metric
from ft_assets.metrics.values import Values
from ft_assets.rows.types import Json, JsonObject


@Metric("valid_json", binary=True, needs_reference=False, config="json_fields")
def valid_json(answers: list[str], json_fields: list[str]) -> list[float]:
    """Score 1 if the whole answer is a JSON object with exactly these keys."""
    parsed = [parse_object(answer) for answer in answers]
    return [float(has_keys(given, json_fields)) for given in parsed]


@Metric("field_f1", config="json_fields", values=True)
def field_f1(
    answers: list[str], references: list[str], json_fields: list[str], values: Values
) -> list[float]:
    """Score 2·right / (fields given + fields expected); right: keys with the expected value."""
    scores = []
    for answer, expected in zip(answers, reference_objects(references, json_fields), strict=True):
        given = parse_object(answer)
        right = len(right_fields(given, expected, values))
        scores.append(2 * right / (len(given or {}) + len(json_fields)))
    return scores


@Metric("field_{}", binary=True, config="json_fields", each=True, values=True)
def field(answers: list[str], references: list[str], name: str, values: Values) -> list[float]:
    """Score 1 if one field of the object has the expected value."""
    pairs = zip(map(parse_object, answers), map(parse_object, references), strict=True)
    return [
        float(composed(name) in right_fields(given, wanted or {}, values))
        for given, wanted in pairs
    ]


def parse_json(text: str) -> tuple[bool, Json]:
    """Return (True, value) if the whole text is strict JSON, else (False, None).

    Text around the JSON, a code fence, NaN, or a key that an object has twice is invalid.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def distinct(pairs: list[tuple[str, Json]]) -> JsonObject:
        found = {composed(key): value for key, value in pairs}
        if len(found) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        return True, json.loads(text, parse_constant=refuse, object_pairs_hook=distinct)
    except (ValueError, RecursionError):
        return False, None


def parse_object(text: str) -> JsonObject | None:
    """Return the object if the whole text is one strict JSON object, else None."""
    _, value = parse_json(text)
    return value if isinstance(value, dict) else None


def json_values(text: str) -> Iterator[Any]:
    """Yield each JSON object or array in a text, and the objects within those, outermost first."""
    decoder, position = json.JSONDecoder(), 0
    while (match := re.compile(r"[{\[]").search(text, position)) is not None:
        try:
            value, position = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            position = match.start() + 1
            continue
        yield value
        if isinstance(value, list):
            yield from (item for item in value if isinstance(item, dict))


def has_keys(given: JsonObject | None, json_fields: list[str]) -> TypeGuard[JsonObject]:
    """Return True for an object with exactly these keys."""
    return given is not None and set(given) == set(map(composed, json_fields))


def right_fields(given: JsonObject | None, expected: JsonObject, values: Values) -> set[str]:
    """Return the keys of `expected` that the answer gives with an equal value."""
    if given is None:
        return set()
    return {
        name
        for name, value in expected.items()
        if name in given and values.same_json(given[name], value, name)
    }


def reference_objects(references: list[str], json_fields: list[str]) -> list[JsonObject]:
    """Parse the references. Raises EvaluationError unless each is an object with these keys."""
    objects: list[JsonObject] = []
    for index, reference in enumerate(references):
        value = parse_object(reference)
        if not has_keys(value, json_fields):
            raise EvaluationError(
                where=f"held-out row {index}",
                found=f"the reference is {reference[:80]!r}",
                expected=f"a JSON object with the keys {', '.join(json_fields)}",
                fix="correct the row, or evaluation.json_fields",
            )
        objects.append(value)
    return objects
