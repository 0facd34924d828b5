"""The geometry of a chart of losses, which a template writes as SVG, in units of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ft_assets.views.comparison import Curves

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 30  # margins of the area with the lines
TICKS = 4
POINTS = 300  # of a line: more are not seen
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line as points of a polyline, its last value, and its classes in style.css."""

    name: str
    style: str
    points: str
    last: float


@dataclass(frozen=True)
class Tick:
    place: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart whose y axis begins at 0, and whose x axis counts steps."""

    title: str
    lines: list[Line]
    steps: list[Tick]
    values: list[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM
    top: int = TOP


def chart(curves: Curves) -> Chart:
    """Return the chart of curves, of which each has a point or more."""
    largest_x = max(x for curve in curves.lines for x, _ in curve.points) or 1
    largest_y = max(y for curve in curves.lines for _, y in curve.points)
    step = _round_step(largest_y / TICKS)
    top = max(step * math.ceil(largest_y / step), step)

    def place(x: float, y: float) -> tuple[float, float]:
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return round(LEFT + wide * x / largest_x, 1), round(HEIGHT - BOTTOM - high * y / top, 1)

    drawn = [
        Line(
            name=curve.name,
            style=" ".join(
                ["line", *["second"] * curve.is_second, *["training"] * curve.is_training]
            ),
            points=" ".join("{},{}".format(*place(x, y)) for x, y in _thinned(curve.points)),
            last=curve.points[-1][1],
        )
        for curve in curves.lines
    ]
    x_step = _round_step(largest_x / TICKS)
    x_ticks = [x_step * i for i in range(int(largest_x / x_step) + 1)]
    y_ticks = [step * i for i in range(round(top / step) + 1)]
    return Chart(
        curves.title,
        drawn,
        [Tick(place(x, 0)[0], f"{x:g}") for x in x_ticks],
        [Tick(place(0, y)[1], f"{y:g}") for y in y_ticks],
    )


def _thinned(points: Points) -> Points:
    every = max(1, math.ceil(len(points) / POINTS))
    return [*points[:-1:every], points[-1]]


def _round_step(value: float) -> float:
    """Return the smallest of 1, 2, 5 · 10^n that is not below a value."""
    if not (value > 0 and math.isfinite(value)):
        return 1.0
    size = 10.0 ** math.floor(math.log10(value))
    return next((factor * size for factor in (1, 2, 5) if factor * size >= value), 10 * size)
