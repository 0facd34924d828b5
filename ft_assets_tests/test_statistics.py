"""Paired statistics and the verdict that they lead to: what passes, what fails, what cannot tell."""

from typing import Any

import pytest

from ft_assets.config import GateSettings
from ft_assets.evaluation.statistics import compare, interval
from ft_assets.evaluation.verdict import FAIL, INCONCLUSIVE, PASS, decide


def test_interval_of_a_mean_covers_it_and_narrows_with_rows() -> None:
    few, many = [0.0, 1.0] * 20, [0.0, 1.0] * 320
    assert interval(few, 0.95, 1)[0] < 0.5 < interval(few, 0.95, 1)[1]
    width = [high - low for low, high in (interval(few, 0.95, 1), interval(many, 0.95, 1))]
    assert width[1] == pytest.approx(width[0] / 4, rel=0.2)  # 16 times the rows: a quarter of the width


def test_compare_counts_wins_ties_losses_and_mcnemar() -> None:
    entry = compare([1.0] * 8 + [0.0] * 2 + [1.0] * 10, [0.0] * 8 + [1.0] * 2 + [1.0] * 10, 0.95, 1)
    assert (entry["wins"], entry["ties"], entry["losses"], entry["n"]) == (8, 10, 2, 20)
    assert entry["mean"] == pytest.approx(0.3)
    assert entry["p_mcnemar"] == pytest.approx(0.109375)  # two-sided binomial of 2 in 10


def test_equal_answers_are_no_difference() -> None:
    entry = compare([1.0, 0.0], [1.0, 0.0], 0.95, 1)
    assert (entry["mean"], entry["low"], entry["high"], entry["p_mcnemar"], entry["rows_needed"]) == (0.0, 0.0, 0.0, 1.0, None)


def report(base: list[float], sft: list[float], dpo: list[float] | None = None, stop: float = 1.0, forgot: float = 0.0) -> dict[str, Any]:
    """Return the numbers that a verdict reads, of given scores a row."""
    rows = {"base": base, "sft": sft} | ({"dpo": dpo} if dpo else {})
    pairs = [("sft", "base")] + ([("dpo", "base"), ("dpo", "sft")] if dpo else [])
    comparisons: dict[str, Any] = {}
    for name, rival in pairs:
        comparisons.setdefault(name, {})[rival] = {"exact": compare(rows[name], rows[rival], 0.95, 1)}
    return {
        "metric": "exact",
        "scores": {name: {"exact": sum(values) / len(values), "stop_rate": stop} for name, values in rows.items()},
        "comparisons": comparisons,
        "retention": {name: {"mean": forgot, "low": forgot, "high": forgot} for name in rows if name != "base"},
        "bound_to": {},
    }


GATE = GateSettings(min_heldout_rows=20)
ALL, NONE, HALF = [1.0] * 60, [0.0] * 60, [1.0, 0.0] * 30


@pytest.mark.parametrize(
    ("numbers", "status", "candidate"),
    [
        (report(NONE, HALF), PASS, "sft"),
        (report(HALF, HALF), INCONCLUSIVE, None),  # a tie is no pass
        (report(HALF, NONE), FAIL, None),
        (report(NONE, ALL, stop=0.5), FAIL, None),
        (report(NONE, ALL, forgot=0.5), FAIL, None),
        (report(NONE[:10], ALL[:10]), INCONCLUSIVE, None),  # too few rows
        (report(NONE, HALF, dpo=ALL), PASS, "dpo"),
        (report(NONE, ALL, dpo=HALF), PASS, "sft"),  # DPO hurts: SFT leaves
        (report(NONE, [1.0, *NONE[1:]]), INCONCLUSIVE, None),  # one lucky row
    ],
)
def test_verdict(numbers: dict[str, Any], status: str, candidate: str | None) -> None:
    verdict = decide(numbers, GATE)
    assert (verdict["status"], verdict["candidate"]) == (status, candidate)


def test_inconclusive_says_how_many_rows_would_decide() -> None:
    reasons = decide(report(NONE, [1.0, 1.0, *NONE[2:]]), GATE)["reasons"]
    assert "held-out rows would decide" in " ".join(reasons)
