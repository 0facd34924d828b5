"""Paired statistics: intervals, tests, what a number of rows can show."""

import numpy as np
import pytest
from scipy.stats import binom

from ft_assets.evaluation.verdict import intervals, statistics
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


def test_equal_answers_are_no_difference_and_no_proof() -> None:
    entry = compare([1.0, 0.0] * 10, [1.0, 0.0] * 10, 0.95, 1)
    assert (entry.mean, entry.p, entry.rows_needed) == (0.0, 1.0, None)
    assert entry.low == pytest.approx(-0.174, abs=1e-3)  # 0 of 20 can hide one in six
    assert entry.high == pytest.approx(0.174, abs=1e-3)
    graded = compare([0.5] * 20, [0.5] * 20, 0.95, 1)
    assert (graded.mean, graded.p) == (0.0, 1.0)
    assert graded.low < -0.15
    assert graded.high > 0.15


def test_one_row_is_compared_and_proves_nothing() -> None:
    for left, right in ((1.0, 0.0), (0.7, 0.2)):
        entry = compare([left], [right], 0.95, 1)
        assert entry.p == 1.0
        assert entry.low < 0 < entry.high
        low, high = interval([left], 0.95, 1)
        assert low < left <= high <= 1.0


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


@pytest.mark.parametrize("rows", [20, 40, 64, 200])
@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05, 0.1])
def test_candidate_that_only_loses_keeps_a_margin_by_error_in_three_of_a_hundred(
    rows: int, margin: float
) -> None:
    """The candidate is worse by exactly the margin; the number of losses is binomial."""
    error = 0.0
    for losses in range(rows + 1):
        base = [1.0] * rows
        entry = compare([0.0] * losses + base[losses:], base, 0.95, 1)
        if entry.low <= -margin:
            break
        error += float(binom.pmf(losses, rows, margin))
    assert error <= 0.03


def differences(kind: str, rows: int, chance: np.random.Generator) -> list[float]:
    """Draw rises of a loss whose true mean is 0.2."""
    if kind == "lognormal":
        return (chance.lognormal(0, 1.2, rows) * 0.2 / np.exp(0.72)).tolist()
    noise = chance.normal(0, 0.02, rows)
    return (np.where(chance.random(rows) < 0.1, 2.0, 0.0) + noise).tolist()


@pytest.mark.parametrize("kind", ["lognormal", "one in ten"])
@pytest.mark.parametrize("rows", [40, 64])
def test_interval_of_skewed_rises_covers_their_mean(kind: str, rows: int) -> None:
    chance, draws, missed = np.random.default_rng(rows), 200, 0
    for _ in range(draws):
        rises = np.asarray(differences(kind, rows, chance))
        entry = compare(
            (rises + 2.0).tolist(), [2.0] * rows, 0.95, 1, lower_is_better=True, bounded=False
        )
        missed += -entry.low < 0.2  # it would prove that the rise is below 0.2
    assert missed / draws <= 0.05  # 7 to 55 % of percentile bootstrap intervals


@pytest.mark.parametrize("correlation", [0.5, 1.0])
def test_groups_of_an_equal_candidate_do_not_make_it_better(correlation: float) -> None:
    chance, draws, better, covered = np.random.default_rng(5), 300, 0, 0
    keys = [str(row // 4) for row in range(64)]
    for _ in range(draws):
        shared = np.repeat(chance.choice([1, -1, 0], 16, p=[0.175, 0.175, 0.65]), 4)
        own = chance.choice([1, -1, 0], 64, p=[0.175, 0.175, 0.65])
        outcome = np.where(chance.random(64) < np.sqrt(correlation), shared, own)
        base = np.where(outcome == 1, 0.0, 1.0)
        entry = compare((base + outcome).tolist(), base.tolist(), 0.95, 1, groups=keys)
        better += entry.mean > 0 and entry.low >= 0 and entry.p < 0.05
        covered += entry.low <= 0 <= entry.high
    assert better / draws <= 0.04  # 10 and 15 % if the rows count as independent
    assert covered / draws >= 0.94  # 78 and 66 %


def test_difference_of_groups_shows_their_correlation_and_effective_rows() -> None:
    keys = [str(row // 4) for row in range(64)]
    base = [0.0] * 64
    same = compare([1.0] * 4 * 8 + [0.0] * 32, base, 0.95, 1, groups=keys)
    assert (same.groups, same.n) == (16, 64)
    assert same.correlation == pytest.approx(1.0)
    assert same.effective_n == pytest.approx(16.0)
    assert "n=64 in 16 groups (correlation 1.00, effective n 16)" in same.describe("exact")
    alone = compare([1.0] * 32 + [0.0] * 32, base, 0.95, 1)
    assert (alone.groups, alone.correlation, alone.effective_n) == (64, None, 64.0)


def test_share_of_all_or_none_has_an_interval() -> None:
    assert interval([1.0] * 40, 0.95, 1) == (pytest.approx(0.912, abs=1e-3), 1.0)
    assert interval([0.0] * 40, 0.95, 1) == (0.0, pytest.approx(0.088, abs=1e-3))


def test_sign_flips_resolve_a_p_value_beyond_their_draws() -> None:
    entry = compare([0.5 + index / 1000 for index in range(60)], [0.2] * 60, 0.95, 1)
    assert 0 < entry.p < 1e-10


def test_signs_in_batches_are_those_of_one_draw() -> None:
    count, seed = intervals.MANY + 1, 3
    chance = np.random.default_rng(seed)
    whole = chance.integers(0, 2, size=(statistics.DRAWS, count), dtype=np.int8) * 2 - 1
    batches = list(statistics._random_signs(count, seed))
    assert max(map(len, batches)) * count <= intervals.BATCH_VALUES  # the memory is bounded
    assert (np.concatenate(batches) == whole).all()
