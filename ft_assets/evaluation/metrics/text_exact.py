"""`evaluate` module: exact match of the stripped text."""

from typing import Any

import datasets
import evaluate


class TextExact(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(
            description="Exact match", citation="", inputs_description="texts", features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {
            "exact": [
                float(answer.strip() == reference.strip())
                for answer, reference in zip(predictions, references, strict=True)
            ]
        }
