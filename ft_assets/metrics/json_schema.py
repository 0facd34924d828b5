"""Metric `schema`: the answer is JSON that meets a JSON schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ft_assets.errors import EvaluationError
from ft_assets.metrics.json_object import parse_json
from ft_assets.metrics.registry import Metric, Option
from ft_assets.rows.types import Json

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError


@Metric(
    "schema", binary=True, needs_reference=False, config="json_schema", packages=("jsonschema",)
)
def schema(answers: list[str], json_schema: Option) -> list[float]:
    """Score 1 if the whole answer is strict JSON that meets the schema (parsed, not its path).

    Raises EvaluationError if the schema refers to what it does not have.
    """
    parsed = [parse_json(answer) for answer in answers]
    return [
        float(is_json and next(_problems(json_schema, value), None) is None)
        for is_json, value in parsed
    ]


def schema_problem(answer: str, json_schema: Option) -> str:
    """Return the reason why a text does not meet the schema, with the place in its JSON."""
    from jsonschema.exceptions import best_match

    is_json, value = parse_json(answer)
    if not is_json:
        return "it is not strict JSON"
    error = best_match(_problems(json_schema, value))
    assert error is not None, "the answer meets the schema"
    return f"at {error.json_path}, {error.message:.200}"


def _problems(json_schema: Option, value: Json) -> Iterator[ValidationError]:
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # With a registry of its own it fetches nothing from the network.
    validator = validator_for(json_schema)(json_schema, registry=Registry())
    try:
        yield from validator.iter_errors(value)
    except Unresolvable as error:
        raise EvaluationError(
            where="evaluation.json_schema",
            found=f"evaluation.json_schema has a $ref that cannot be resolved: {error}",
            expected="a schema that refers to itself alone",
            fix="copy what it refers to into $defs of the schema",
        ) from None
