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
