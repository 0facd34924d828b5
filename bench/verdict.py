"""Measure the error rates of the verdict, on draws of held-out scores with a known truth.

    python bench/verdict.py [draws]

The verdict's own code judges each draw. Three tables: false PASSes, margins and tolerances that are
called kept although the truth is exactly at them, and the coverage of the intervals with the power
that is left. "Percentile" is the rule of a percentile bootstrap interval on the same draws.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from functools import partial as of

import numpy as np

from ft_assets.config import GateSettings
from ft_assets.evaluation.report_model import Comparisons, Difference, Retention
from ft_assets.evaluation.verdict.decision import PASS, decide
from ft_assets.evaluation.verdict.spending import spent_confidence
from ft_assets.evaluation.verdict.statistics import compare, interval
from ft_assets_tests.reports import empty_report

ROWS = (20, 40, 64, 200)
PLAIN = {"stop_rate": 1.0, "refused": 0.0, "repetition": 0.0}
# Minimums would hide the errors of few groups.
NO_MINIMUM = {"min_heldout_rows": 1, "min_graded_rows": 1, "min_retention_rows": 1}
Chance = np.random.Generator
Draw = Callable[[Chance, int], np.ndarray]  # differences, candidate − base, of n rows


def right_or_wrong(chance: Chance, n: int, gain: float, discordant: float = 0.35) -> np.ndarray:
    """Draw 0/1 scores: the share `discordant` of rows differs."""
    kinds = [(discordant + gain) / 2, (discordant - gain) / 2, 1 - discordant]
    return chance.choice([1.0, -1.0, 0.0], size=n, p=kinds)


def only_loses(chance: Chance, n: int, share: float) -> np.ndarray:
    """Draw 0/1 scores that lose in this share of rows and never win."""
    return -(chance.random(n) < share).astype(float)


def normal(chance: Chance, n: int, gain: float) -> np.ndarray:
    return chance.normal(gain, 0.25, n)


def lognormal(chance: Chance, n: int, mean: float, scale: float) -> np.ndarray:
    """Draw skewed changes around `mean`, with the long tail in the direction of `scale`."""
    return mean + scale * (chance.lognormal(0, 1.2, n) / np.exp(0.72) - 1)


def one_in_ten(chance: Chance, n: int, mean: float, size: float) -> np.ndarray:
    """Draw changes of which one in ten is `size`, and the others are small."""
    return mean + size * ((chance.random(n) < 0.1) - 0.1) + chance.normal(0, 0.02, n)


def grouped(chance: Chance, n: int, draw: Draw, count: int, correlation: float) -> np.ndarray:
    """Draw rows that take the value of their group with probability √correlation."""
    shared = np.repeat(draw(chance, count), n // count)
    return np.where(chance.random(n) < np.sqrt(correlation), shared, draw(chance, n))


def keys(count: int, n: int) -> list[str]:
    return [str(row // (n // count)) for row in range(n)]


def scores(differences: np.ndarray, binary: bool) -> tuple[list[float], list[float]]:
    """Return scores of (candidate, base) with these differences."""
    base = (differences < 0).astype(float) if binary else np.full(len(differences), 2.0)
    return (base + differences).tolist(), base.tolist()


@dataclass(frozen=True)
class Line:
    """One truth. what: its name. groups: the number of groups, 0 for independent rows."""

    what: str
    n: int
    draw: Draw
    binary: bool
    gate: GateSettings
    groups: int = 0
    candidates: int = 1
    metrics: int = 1
    tolerance: bool = False


def difference(line: Line, chance: Chance, seed: int) -> Difference:
    candidate, base = scores(line.draw(chance, line.n), line.binary)
    groups = keys(line.groups, line.n) if line.groups else None
    return compare(candidate, base, 0.95, seed, groups=groups, bounded=line.binary)


def passes(line: Line, seed: int) -> bool:
    """Judge one draw by the verdict's own code."""
    chance = np.random.default_rng([seed, line.n, line.groups])
    names = ("sft", "dpo")[: line.candidates]
    metrics = ("exact", "second", "third")[: line.metrics]
    comparisons: Comparisons = {
        name: {"base": {metric: difference(line, chance, seed) for metric in metrics}}
        for name in names
    }
    retention = None
    if line.tolerance:  # the draws are of general prompts; the held-out rows are clearly better
        found = comparisons["sft"]["base"]["exact"]
        same = compare([1.0, 0.0] * 100, [1.0, 0.0] * 100, 0.95, seed)
        retention = Retention(
            metric="exact",
            rows=line.n,
            answered=line.n,
            scores={"base": PLAIN, "sft": PLAIN},
            comparisons={"sft": {"base": {"loss": found, "exact": same}}},
        )
        comparisons["sft"]["base"]["exact"] = compare([1.0] * 100, [0.0] * 100, 0.95, seed)
    if line.candidates == 2:
        comparisons["dpo"]["sft"] = {"exact": difference(line, chance, seed)}
    report = empty_report(
        heldout_rows=line.n,
        heldout_groups=line.groups or line.n,
        scores={name: {"exact": 0.5, **PLAIN} for name in ("base", *names)},
        comparisons=comparisons,
        retention=retention,
    )
    return decide(report, line.gate).status == PASS


def percentile(differences: np.ndarray, chance: Chance) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean."""
    means = differences[chance.integers(0, len(differences), (999, len(differences)))].mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def percentile_keeps(line: Line, seed: int, margin: float) -> bool:
    """Return True if the percentile interval is above −margin."""
    chance = np.random.default_rng([seed, line.n, line.groups])
    return percentile(line.draw(chance, line.n), chance)[0] > -margin


def rate(pool: ProcessPoolExecutor, one: Callable[[int], bool], draws: int) -> float:
    return float(np.mean(list(pool.map(one, range(draws), chunksize=20))))


def false_passes() -> list[Line]:
    gate = GateSettings()
    metrics = {"exact": "better", "second": "better", "third": "better"}
    three = GateSettings.model_validate({"metrics": metrics, "better": "any"})
    bare = GateSettings.model_validate(NO_MINIMUM)
    equal = of(right_or_wrong, gain=0)
    lines = []
    for n in ROWS:
        lines += [
            Line("equal, 0/1", n, of(right_or_wrong, gain=0), True, gate),
            Line(
                "equal, 0/1, SFT and DPO", n, of(right_or_wrong, gain=0), True, gate, candidates=2
            ),
            Line(
                "equal, 0/1, any of three metrics",
                n,
                of(right_or_wrong, gain=0),
                True,
                three,
                metrics=3,
            ),
            Line("equal, graded", n, of(normal, gain=0), False, gate),
            Line("equal, lognormal losses", n, of(lognormal, mean=0, scale=-0.2), False, gate),
            Line("equal, lognormal gains", n, of(lognormal, mean=0, scale=0.2), False, gate),
            Line(
                "equal, one row in ten loses 1", n, of(one_in_ten, mean=0, size=-1.0), False, gate
            ),
            Line("worse by 0.05, 0/1", n, of(right_or_wrong, gain=-0.05), True, gate),
        ]
    for n, count in ((64, 16), (200, 20)):
        for r in (0.5, 1.0):
            smooth = of(normal, gain=0)
            what = f"{count} groups, correlation {r}"
            lines += [
                Line(
                    f"equal, 0/1, {what}",
                    n,
                    of(grouped, draw=equal, count=count, correlation=r),
                    True,
                    bare,
                    count,
                ),
                Line(
                    f"equal, graded, {what}",
                    n,
                    of(grouped, draw=smooth, count=count, correlation=r),
                    False,
                    bare,
                    count,
                ),
            ]
    return lines


def kept_margins() -> list[tuple[Line, float]]:
    """Return lines whose truth is exactly at the margin or tolerance, with that number."""
    lines = []
    for n in ROWS:
        for margin in (0.05, 0.1):
            gate = GateSettings(metrics={"exact": margin})
            lines.append(
                (Line("only loses, 0/1", n, of(only_loses, share=margin), True, gate), margin)
            )
        margin = GateSettings(metrics={"exact": 0.1})
        rise = GateSettings(max_retention_loss=0.2)
        lossy = of(one_in_ten, mean=-0.1, size=-1.0)
        long = of(lognormal, mean=-0.2, scale=-0.2)
        rare = of(one_in_ten, mean=-0.2, size=-2.0)
        lines += [
            (Line("wins and loses, 0/1", n, of(right_or_wrong, gain=-0.1), True, margin), 0.1),
            (Line("lognormal losses", n, of(lognormal, mean=-0.1, scale=-0.1), False, margin), 0.1),
            (Line("one in ten loses 1", n, lossy, False, margin), 0.1),
            (Line("general loss, lognormal", n, long, False, rise, tolerance=True), 0.2),
            (Line("general loss, one in ten", n, rare, False, rise, tolerance=True), 0.2),
        ]
    bare = GateSettings.model_validate({**NO_MINIMUM, "metrics": {"exact": 0.1}})
    for n, count in ((64, 16), (200, 20), (200, 40)):
        for r in (0.5, 1.0):
            what = f"{count} groups, correlation {r}"
            loses, mixed = of(only_loses, share=0.1), of(right_or_wrong, gain=-0.1)
            lines += [
                (
                    Line(
                        f"only loses, 0/1, {what}",
                        n,
                        of(grouped, draw=loses, count=count, correlation=r),
                        True,
                        bare,
                        count,
                    ),
                    0.1,
                ),
                (
                    Line(
                        f"wins and loses, 0/1, {what}",
                        n,
                        of(grouped, draw=mixed, count=count, correlation=r),
                        True,
                        bare,
                        count,
                    ),
                    0.1,
                ),
            ]
    return lines


def year(n: int, candidates: int, seed: int) -> bool:
    """Return True if one of 52 models that are as good as the base passes, on the same rows.

    The base's answers stay the same; each week the candidate answers like it on average.
    """
    chance = np.random.default_rng([seed, n, candidates])
    right = chance.beta(0.6, 1.4, n)
    base = (chance.random(n) < right).astype(float)
    for week in range(1, 53):
        sft = (chance.random(n) < right).astype(float)
        kept = chance.random(n) < 0.9
        answers = {"sft": sft, "dpo": np.where(kept, sft, chance.random(n) < right)}
        names = ("sft", "dpo")[:candidates]
        confidence = spent_confidence(0.95, week)
        comparisons: Comparisons = {
            name: {"base": {"exact": compare(answers[name].tolist(), base.tolist(), confidence, 1)}}
            for name in names
        }
        if candidates == 2:
            found = compare(answers["dpo"].tolist(), sft.tolist(), confidence, 1)
            comparisons["dpo"]["sft"] = {"exact": found}
        report = empty_report(
            heldout_rows=n,
            confidence=confidence,
            scores={name: {"exact": 0.5, **PLAIN} for name in ("base", *names)},
            comparisons=comparisons,
        )
        if decide(report, GateSettings()).status == PASS:
            return True
    return False


def covers(line: Line, truth: float, seed: int) -> bool:
    """Return True if the interval of the difference covers the truth."""
    found = difference(line, np.random.default_rng([seed, line.n, line.groups]), seed)
    return found.low <= truth <= found.high


def share_covers(n: int, truth: float, groups: int, seed: int) -> bool:
    """Return True if the interval of a share covers it; groups of correlation 1."""
    chance = np.random.default_rng([seed, n])
    drawn = chance.random(groups or n) < truth
    values = np.repeat(drawn, n // groups) if groups else drawn
    low, high = interval(
        values.astype(float).tolist(), 0.95, 1, keys(groups, n) if groups else None
    )
    return low - 1e-9 <= truth <= high + 1e-9


def coverage() -> list[tuple[Line, float]]:
    gate = GateSettings()
    lines = []
    for n in (40, 64, 200):
        lines += [
            (Line("0/1, equal", n, of(right_or_wrong, gain=0), True, gate), 0.0),
            (Line("0/1, only loses 0.05", n, of(only_loses, share=0.05), True, gate), -0.05),
            (Line("0/1, only loses 0.2", n, of(only_loses, share=0.2), True, gate), -0.2),
            (Line("graded, normal", n, of(normal, gain=0), False, gate), 0.0),
            (Line("graded, lognormal", n, of(lognormal, mean=-0.2, scale=-0.2), False, gate), -0.2),
            (
                Line("graded, one in ten", n, of(one_in_ten, mean=-0.2, size=-2.0), False, gate),
                -0.2,
            ),
        ]
    for r in (0.5, 1.0):
        draws = (
            of(grouped, draw=of(right_or_wrong, gain=0), count=16, correlation=r),
            of(grouped, draw=of(normal, gain=0), count=16, correlation=r),
        )
        lines += [
            (Line(f"0/1, 16 groups, correlation {r}", 64, draws[0], True, gate, 16), 0.0),
            (Line(f"graded, 16 groups, correlation {r}", 64, draws[1], False, gate, 16), 0.0),
        ]
    return lines


def power() -> list[tuple[Line, float]]:
    """Return lines whose truth is better, or equal under a margin, on independent rows."""
    gate, margin = GateSettings(), GateSettings(metrics={"exact": 0.1})
    lines = []
    for n, gain, small in ((64, 0.212, 0.089), (200, 0.118, 0.05)):
        lines += [
            (Line(f"better by {gain}, 0/1", n, of(right_or_wrong, gain=gain), True, gate), 0.0),
            (Line(f"better by {small}, graded", n, of(normal, gain=small), False, gate), 0.0),
            (
                Line(
                    "equal, margin 0.1, 0/1",
                    n,
                    of(right_or_wrong, gain=0, discordant=0.1),
                    True,
                    margin,
                ),
                0.1,
            ),
            (Line("equal, margin 0.1, graded", n, of(normal, gain=0), False, margin), 0.1),
        ]
    return lines


def main(draws: int) -> None:
    error = 100 * (0.03 * 0.97 / draws) ** 0.5
    print(f"{draws} draws a line; the standard error of 3 % is {error:.1f} %\n")
    with ProcessPoolExecutor() as pool:
        _print("rows", "truth: not better", ["false PASS"])
        for line in false_passes():
            _print(line.n, line.what, [f"{rate(pool, partial(passes, line), draws):.1%}"])
        for n in (64, 200):
            for count in (1, 2):
                found = rate(pool, partial(year, n, count), max(100, draws // 4))
                _print(n, f"equal, one of 52 verdicts, {count} candidates", [f"{found:.1%}"])
        _print(
            "rows", "truth: worse by exactly the margin", ["margin", "called kept", "percentile"]
        )
        for line, margin in kept_margins():
            found = rate(pool, partial(passes, line), draws)
            before = rate(pool, partial(percentile_keeps, line, margin=margin), draws // 2)
            _print(line.n, line.what, [f"{margin}", f"{found:.1%}", f"{before:.1%}"])
        _print("rows", "interval", ["coverage"])
        for line, truth in coverage():
            found = rate(pool, partial(covers, line, truth), draws)
            _print(line.n, line.what, [f"{found:.1%}"])
        for n, truth, count in [(n, p, 0) for n in (40, 64, 200) for p in (0.5, 0.9, 0.99)] + [
            (64, 0.9, 16)
        ]:
            found = rate(pool, partial(share_covers, n, truth, count), draws)
            what = f"share {truth}" + (f", {count} groups" if count else "")
            _print(n, what, [f"{found:.1%}"])
        _print("rows", "truth: good", ["PASS", "percentile"])
        for line, margin in power():
            found = rate(pool, partial(passes, line), draws)
            before = rate(pool, partial(percentile_passes, line, margin), draws)
            _print(line.n, line.what, [f"{found:.1%}", f"{before:.1%}"])


def percentile_passes(line: Line, margin: float, seed: int) -> bool:
    """Judge a draw by the percentile interval, and by the same p-value if it must be better."""
    chance = np.random.default_rng([seed, line.n, line.groups])
    values = line.draw(chance, line.n)
    low = percentile(values, chance)[0]
    if margin:
        return low > -margin
    candidate, base = scores(values, line.binary)
    found = compare(candidate, base, 0.95, seed, bounded=line.binary)
    return found.mean > 0 and low >= 0 and found.p < 0.05


def _print(rows: object, what: str, cells: Sequence[str]) -> None:
    if rows == "rows":
        print()
    print("|", " | ".join([str(rows), what, *cells]), "|", flush=True)
    if rows == "rows":
        print("|" + "---|" * (2 + len(cells)))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
