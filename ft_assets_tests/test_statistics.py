"""Paired statistics: intervals, tests, what a number of rows can show."""

import numpy as np
import pytest

from ft_assets.evaluation.verdict.holm import holm
from ft_assets.evaluation.verdict.statistics import _mcnemar as compare_p
from ft_assets.evaluation.verdict.statistics import compare, interval, mcnemar_power


def test_interval_of_a_mean_covers_it_and_narrows_with_rows() -> None:
    few, many = [0.0, 1.0] * 20, [0.0, 1.0] * 320
    assert interval(few, 0.95, 1)[0] < 0.5 < interval(few, 0.95, 1)[1]
    width = [high - low for low, high in (interval(few, 0.95, 1), interval(many, 0.95, 1))]
    assert width[1] == pytest.approx(
        width[0] / 4, rel=0.2
    )  # 16 times the rows: a quarter of the width


def test_compare_counts_wins_ties_losses_and_mcnemar() -> None:
    entry = compare([1.0] * 8 + [0.0] * 2 + [1.0] * 10, [0.0] * 8 + [1.0] * 2 + [1.0] * 10, 0.95, 1)
    assert (entry.wins, entry.ties, entry.losses, entry.n, entry.test) == (
        8,
        10,
        2,
        20,
        "McNemar",
    )
    assert entry.mean == pytest.approx(0.3)
    assert entry.p == pytest.approx(0.109375)  # two-sided binomial of 2 in 10


def test_equal_answers_are_no_difference() -> None:
    entry = compare([1.0, 0.0], [1.0, 0.0], 0.95, 1)
    assert (entry.mean, entry.low, entry.high, entry.p, entry.rows_needed) == (
        0.0,
        0.0,
        0.0,
        1.0,
        None,
    )


def test_scores_that_are_not_right_or_wrong_are_permuted() -> None:
    chance = np.random.default_rng(0)
    rival = chance.random(60).tolist()
    entry = compare([value + 0.1 for value in rival], rival, 0.95, 1)
    assert entry.test == "permutation"
    assert entry.p < 0.001
    noise = compare(chance.random(60).tolist(), rival, 0.95, 1)
    assert noise.p > 0.05 or noise.low < 0 < noise.high


def test_a_loss_is_oriented_so_that_less_is_a_win() -> None:
    entry = compare([1.0] * 10 + [1.5] * 2, [2.0] * 12, 0.95, 1, lower_is_better=True)
    assert (entry.mean, entry.wins) == (pytest.approx(11 / 12), 12)
    assert entry.low > 0


def test_holm_makes_the_second_test_pay_for_the_first() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    assert holm({}) == {}


def test_holm_agrees_with_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    chance = np.random.default_rng(4)
    for count in (1, 2, 7):
        values = {str(index): float(chance.random() ** 4) for index in range(count)}
        expected = multipletests(list(values.values()), method="holm")[1]
        assert list(holm(values).values()) == pytest.approx(list(expected), abs=0)


def test_detectable_difference_shrinks_with_rows_and_has_the_stated_power() -> None:
    def rows(count: int) -> tuple[list[float], list[float]]:
        return [1.0, 0.0, 1.0, 0.0, 0.0] * count, [0.0, 1.0, 1.0, 0.0, 0.0] * count

    small, large = (compare(*rows(count), 0.95, 1).detectable for count in (12, 120))
    assert large < small / 2
    assert mcnemar_power(60, 0.4, small, 0.05) == pytest.approx(0.8, abs=1e-6)


def test_power_equals_the_simulated_power_of_the_same_test() -> None:
    chance, n, discordant, difference = np.random.default_rng(0), 80, 0.3, 0.2
    found = 0
    for _ in range(2000):
        outcome = chance.choice(
            [1, -1, 0],
            size=n,
            p=[(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant],
        )
        wins, losses = int((outcome == 1).sum()), int((outcome == -1).sum())
        found += wins > losses and compare_p(wins, losses) < 0.05
    assert found / 2000 == pytest.approx(mcnemar_power(n, discordant, difference, 0.05), abs=0.03)


def test_rows_needed_grows_as_the_difference_shrinks() -> None:
    large = compare([1.0] * 12 + [0.0] * 48, [0.0] * 60, 0.95, 1).rows_needed
    small = compare([1.0] * 3 + [0.0] * 57, [0.0] * 60, 0.95, 1).rows_needed
    assert large < 60 < small
