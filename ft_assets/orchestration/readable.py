"""Numbers as a person reads them in the UI. The exact values stay in the artifacts' JSON."""

from typing import Any

import dagster as dg

DIGITS = 4  # significant
WHOLE = 10_000  # from here on decimals say nothing


def readable(value: Any) -> Any:
    """Return a number, or the metadata value of one, rounded. Return other values unchanged."""
    if isinstance(value, dg.FloatMetadataValue):
        return value if value.value is None else dg.MetadataValue.float(_rounded(value.value))
    return _rounded(value) if isinstance(value, float) else value


def _rounded(number: float) -> float:
    return round(number, 0) if abs(number) >= WHOLE else float(f"{number:.{DIGITS}g}")
