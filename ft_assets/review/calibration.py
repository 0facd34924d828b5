"""The calibration of an LLM judge: its agreement with people, its bias for position and length."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ft_assets.evaluation.report_model import Agreement, JudgeCalibration, Leaning
from ft_assets.review.agreement import agreement


@dataclass(frozen=True)
class Compared:
    """One answer against the base's, by the judge and by people: 1, ½ or 0, or between.

    longer: 1, 0 or -1 where the answer is longer than the base's, equally long, or shorter.
    """

    cluster: str
    judge: float
    people: float
    longer: int


def calibrated(
    pairs: Sequence[Compared],
    orders: Counter[tuple[str, str]],
    among_people: Agreement | None,
    bar: float,
    confidence: float,
    seed: int,
) -> JudgeCalibration:
    """Return the calibration on pairs of different answers.

    orders: how often the judge gave which replies to a pair in its two orders.
    """
    units: dict[str, list[list[int]]] = {}
    for pair in pairs:
        units.setdefault(pair.cluster, []).append([_side(pair.judge), _side(pair.people)])
    return JudgeCalibration(
        bar=bar,
        with_people=agreement(units, confidence, seed),
        among_people=among_people,
        asked=orders.total(),
        first_twice=orders["A", "A"],
        second_twice=orders["B", "B"],
        longer=_leaning(pairs, 1),
        shorter=_leaning(pairs, -1),
    )


def _side(score: float) -> int:
    return (score > 0.5) - (score < 0.5)


def _leaning(pairs: Sequence[Compared], direction: int) -> Leaning:
    """Return how often people agree where the judge prefers the longer, or the shorter, answer."""
    its = [pair for pair in pairs if pair.longer and _side(pair.judge) == direction * pair.longer]
    same = [_side(pair.people) == _side(pair.judge) for pair in its]
    return Leaning(pairs=len(its), agree=statistics.fmean(same) if same else None)
