"""Metric `json_f1`: F1 over the values of nested JSON objects and lists."""

from ft_assets.errors import EvaluationError
from ft_assets.metrics.json_object import parse_json
from ft_assets.metrics.registry import Metric
from ft_assets.metrics.values import Values, below
from ft_assets.rows.types import Json


@Metric("json_f1", any_reference=False, values=True, packages=("scipy",))
def json_f1(answers: list[str], references: list[str], values: Values) -> list[float]:
    """Score 2·right / (values given + values expected), over texts, numbers, bools and nulls.

    A value is right at the same path. The items of a list are paired so that most values are right
    (the assignment problem), whatever their order. An empty list or object counts as one value.
    """
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        is_json, expected = parse_json(reference)
        if not is_json:
            raise EvaluationError(
                where="a held-out row",
                found=f"the reference is {reference[:80]!r}",
                expected="JSON: json_f1 is in evaluation.metrics",
                fix="correct the row, or evaluation.metrics",
            )
        is_json, given = parse_json(answer)
        scores.append(_f1(given, expected, values) if is_json else 0.0)
    return scores


def _f1(given: Json, expected: Json, values: Values) -> float:
    try:
        return 2 * _right(given, expected, "", values) / (_size(given) + _size(expected))
    except RecursionError:  # an answer that opens brackets up to its limit
        return 0.0


def _right(given: Json, expected: Json, path: str, values: Values) -> int:
    """Return the number of values that are right."""
    if path in values.kinds or not isinstance(expected, dict | list):
        return int(values.same(given, expected, path))
    if type(given) is not type(expected):
        return 0
    if not given or not expected:
        return int(given == expected)
    if isinstance(given, dict) and isinstance(expected, dict):
        shared = given.keys() & expected.keys()
        return sum(_right(given[key], expected[key], below(path, key), values) for key in shared)
    assert isinstance(given, list) and isinstance(expected, list)
    return _most([[_right(one, other, path, values) for other in expected] for one in given])


def _most(right: list[list[int]]) -> int:
    """Return the largest sum of a pairing of rows and columns."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(right, maximize=True)
    return sum(right[row][column] for row, column in zip(rows, columns, strict=True))


def _size(value: Json) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_size, value)) or 1 if isinstance(value, list) else 1
