"""The shape of the code stays what bench/house.py measures it by: typed walls, short functions."""

import pytest

from bench.house import PACKAGE, Shape, shape_of


@pytest.fixture(scope="module")
def shape() -> Shape:
    return shape_of(PACKAGE)


def test_untyped_dicts_stay_rare(shape: Shape) -> None:
    assert shape.untyped_dicts_per_kloc <= 4.0


def test_functions_stay_short(shape: Shape) -> None:
    assert shape.long_function_share <= 0.01


def test_lines_stay_within_100_columns(shape: Shape) -> None:
    assert shape.wide_lines == 0
