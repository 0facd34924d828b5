"""`evaluate` modules of the answer's form: a JSON schema, a regular expression, a closed set of labels."""

import re
from typing import Any

import datasets
import evaluate

from ft_assets.evaluation.metrics.json_object import parse_json

FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
)


class Schema(evaluate.Metric):
    """1 where the whole answer is JSON that meets the schema."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="JSON schema", citation="", inputs_description="texts", features=FEATURES
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: list[str], references: list[str], schema: dict[str, Any]
    ) -> dict[str, Any]:
        from jsonschema.validators import validator_for

        validator = validator_for(schema)(schema)
        parsed = [parse_json(answer) for answer in predictions]
        return {"schema": [float(ok and validator.is_valid(value)) for ok, value in parsed]}


class Pattern(evaluate.Metric):
    """1 where the whole stripped answer matches the pattern."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Regular expression",
            citation="",
            inputs_description="texts",
            features=FEATURES,
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: list[str], references: list[str], pattern: str
    ) -> dict[str, Any]:
        compiled = re.compile(pattern)
        return {
            "regex": [
                float(compiled.fullmatch(answer.strip()) is not None) for answer in predictions
            ]
        }


class Label(evaluate.Metric):
    """`label`: the answer is the reference, but for case, blanks and a final full stop; `known_label`: it is any of the labels."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Label accuracy", citation="", inputs_description="texts", features=FEATURES
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: list[str], references: list[str], labels: list[str]
    ) -> dict[str, Any]:
        known = {normal_label(label) for label in labels}
        given = [normal_label(answer) for answer in predictions]
        right = [
            float(answer == normal_label(reference))
            for answer, reference in zip(given, references, strict=True)
        ]
        return {"label": right, "known_label": [float(answer in known) for answer in given]}


def normal_label(text: str) -> str:
    """Return a label without case, outer blanks, quotes and a final full stop."""
    return " ".join(text.casefold().split()).strip("\"'. ")
