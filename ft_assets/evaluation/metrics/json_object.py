"""`evaluate` module: is the answer one strict JSON object, is it the right one, how many fields are right.

Each score is a list, one number a row, so that candidates can be compared pair by pair.
`field_f1` is 2·right / (fields given + fields expected), `right` counting keys with the expected value.
"""

import json
from typing import Any

import datasets
import evaluate


def parse_json(text: str) -> tuple[bool, Any]:
    """Return (whether the whole text is strict JSON, its value): prose around it, a code fence or NaN is invalid."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return True, json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False, None


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the object if the whole text is one JSON object, else None."""
    _, value = parse_json(text)
    return value if isinstance(value, dict) else None


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and left == right


class JsonObject(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(
            description="Strict JSON object",
            citation="",
            inputs_description="texts",
            features=features,
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: list[str], references: list[str], fields: list[str]
    ) -> dict[str, Any]:
        scores: dict[str, list[float]] = {
            "exact": [],
            "valid_json": [],
            "field_f1": [],
            **{f"field_{name}": [] for name in fields},
        }
        for answer, reference in zip(predictions, references, strict=True):
            given, expected = parse_object(answer), json.loads(reference)
            right = {
                name: given is not None and name in given and _same(given[name], expected[name])
                for name in fields
            }
            for name in fields:
                scores[f"field_{name}"].append(float(right[name]))
            scores["valid_json"].append(float(given is not None and set(given) == set(fields)))
            scores["exact"].append(
                float(given is not None and set(given) == set(fields) and all(right.values()))
            )
            scores["field_f1"].append(2 * sum(right.values()) / (len(given or {}) + len(fields)))
        return scores
