"""One rule of equality for all metrics: of texts, and of JSON values."""

import unicodedata

from ft_assets.rows.types import Json


def composed(text: str) -> str:
    """Return the text in Unicode's NFC: é is one character, however it is written."""
    return unicodedata.normalize("NFC", text)


def same_json(one: Json, other: Json) -> bool:
    """Return True if two JSON values are equal, lists and objects to any depth.

    Numbers are equal by value (1 and 1.0). A bool is not a number. Texts and keys are compared in
    NFC. The order of keys does not count, the order of a list does.
    """
    pairs = [(one, other)]
    while pairs:  # no recursion: a value may be nested deeper than Python's stack
        left, right = pairs.pop()
        if isinstance(left, dict) and isinstance(right, dict):
            ours, theirs = _by_key(left), _by_key(right)
            if ours.keys() != theirs.keys():
                return False
            pairs += [(ours[key], theirs[key]) for key in ours]
        elif isinstance(left, list) and isinstance(right, list):
            if len(left) != len(right):
                return False
            pairs += zip(left, right, strict=True)
        elif not _same_scalar(left, right):
            return False
    return True


def _by_key(value: dict[str, Json]) -> dict[str, Json]:
    return {composed(key): entry for key, entry in value.items()}


def _same_scalar(left: Json, right: Json) -> bool:
    if isinstance(left, str) and isinstance(right, str):
        return composed(left) == composed(right)
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if numbers and isinstance(left, bool) == isinstance(right, bool):
        return left == right
    return left is None and right is None
