"""One rule of equality for all metrics: of texts, and of scalars of JSON."""

import unicodedata

from ft_assets.rows.types import Json


def composed(text: str) -> str:
    """Return the text in Unicode's NFC: é is one character, however it is written."""
    return unicodedata.normalize("NFC", text)


def same_scalar(left: Json, right: Json) -> bool:
    """Return True if two values are equal and no lists or objects.

    Numbers are equal by value (1 and 1.0). A bool is not a number. Texts are compared in NFC.
    """
    if isinstance(left, str) and isinstance(right, str):
        return composed(left) == composed(right)
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if numbers and isinstance(left, bool) == isinstance(right, bool):
        return left == right
    return left is None and right is None
