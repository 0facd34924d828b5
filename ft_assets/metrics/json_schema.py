"""Metric `schema`: the answer is JSON that meets a JSON schema."""

from ft_assets.metrics.json_object import parse_json
from ft_assets.metrics.registry import Metric, Option


@Metric(
    "schema", binary=True, needs_reference=False, config="json_schema", packages=("jsonschema",)
)
def schema(answers: list[str], json_schema: Option) -> list[float]:
    """Score 1 if the whole answer is strict JSON that meets the schema (parsed, not its path)."""
    from jsonschema.validators import validator_for

    validator = validator_for(json_schema)(json_schema)
    parsed = [parse_json(answer) for answer in answers]
    return [float(is_json and validator.is_valid(value)) for is_json, value in parsed]


def schema_problem(answer: str, json_schema: Option) -> str:
    """Return the reason why a text does not meet the schema, with the place in its JSON."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for

    is_json, value = parse_json(answer)
    if not is_json:
        return "it is not strict JSON"
    error = best_match(validator_for(json_schema)(json_schema).iter_errors(value))
    return f"at {error.json_path}, {error.message:.200}"
