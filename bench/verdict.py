"""Measure the error rates of the verdict, on draws of held-out scores with a known truth.

    python bench/verdict.py [draws]

The verdict's own code judges each draw. Each line is one truth. A PASS is false if the candidate is
not better. Power is the share of PASS if the candidate is better by exactly the difference that the
report calls detectable with these rows.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from statsmodels.stats.power import TTestPower

from ft_assets.config import GateSettings
from ft_assets.evaluation.report_model import Comparisons
from ft_assets.evaluation.verdict.decision import FAIL, PASS, decide
from ft_assets.evaluation.verdict.statistics import compare, mcnemar_power
from ft_assets_tests.reports import empty_report

GATE = GateSettings(min_heldout_rows=20)
SEVERAL = GateSettings(
    min_heldout_rows=20, metrics={"exact": "better", "second": "better", "third": "better"}
)
MARGIN = GateSettings(min_heldout_rows=20, metrics={"exact": 0.1})


def right_or_wrong(
    chance: np.random.Generator, n: int, base: float, gain: float, discordant: float
) -> tuple[list[float], list[float]]:
    """Return 0/1 scores of (base, candidate).

    The candidate is better by `gain`; the share `discordant` of the rows differs.
    """
    kinds = [(discordant + gain) / 2, (discordant - gain) / 2]
    outcome = chance.choice([1, -1, 0], size=n, p=[*kinds, 1 - sum(kinds)])
    tied = (chance.random(n) < base).astype(float)
    left = np.where(outcome == 1, 0.0, np.where(outcome == -1, 1.0, tied))
    return left.tolist(), (left + outcome).clip(0, 1).tolist()


def graded(chance: np.random.Generator, n: int, gain: float) -> tuple[list[float], list[float]]:
    """Return skewed scores in [0, 1] of (base, candidate)."""
    base = chance.beta(0.6, 1.2, n)
    return base.tolist(), (base + gain + chance.normal(0, 0.25, n)).tolist()


def verdict(seed: int, n: int, gain: float, kind: str, gate: GateSettings, candidates: int) -> str:
    chance = np.random.default_rng([seed, n, candidates])
    base: dict[str, list[float]] = {}
    comparisons: Comparisons = {}
    for name in ("sft", "dpo")[:candidates]:
        entries, found = {}, {}
        for metric in ("exact", *[metric for metric in gate.metrics if metric != "exact"]):
            left, right = (
                right_or_wrong(chance, n, 0.3, gain, 0.35)
                if kind == "right or wrong"
                else graded(chance, n, gain)
            )
            entries[metric], found[metric] = compare(right, left, gate.confidence, seed), right
        comparisons[name] = {"base": entries}
        base[name] = found["exact"]
    if candidates == 2:
        comparisons["dpo"]["sft"] = {
            "exact": compare(base["dpo"], base["sft"], gate.confidence, seed)
        }
    plain = {"stop_rate": 1.0, "refused": 0.0, "repetition": 0.0}
    scores = {"base": {"exact": 0.3, **plain}} | {
        name: {"exact": float(np.mean(values)), **plain} for name, values in base.items()
    }
    report = empty_report(heldout_rows=n, scores=scores, comparisons=comparisons)
    return decide(report, gate).status


def detectable(n: int) -> float:
    """Return the difference that n rows of these draws detect with a power of 80 %."""
    low, high = 0.0, 0.35
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mcnemar_power(n, 0.35, middle, 0.05) < 0.8 else (low, middle)
    return high


def main(draws: int) -> None:
    told = {64: detectable(64), 200: detectable(200)}
    graded_sd = 0.25
    shown = {
        n: graded_sd * float(TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8))
        for n in (64, 200)
    }
    lines = []
    for n in (64, 200):
        for kind in ("right or wrong", "graded"):
            lines += [(n, kind, "worse by 0.05", -0.05, GATE, 1), (n, kind, "equal", 0.0, GATE, 1)]
            lines += [
                (n, kind, "equal, SFT and DPO", 0.0, GATE, 2),
                (n, kind, "equal, three metrics", 0.0, SEVERAL, 1),
            ]
            lines += [(n, kind, "worse by the margin 0.1", -0.1, MARGIN, 1)]
            gain = told[n] if kind == "right or wrong" else shown[n]
            lines += [(n, kind, f"better by what it can show, {gain:.3f}", gain, GATE, 1)]
    print(
        f"{draws} draws a line, five times as many for power\n\n"
        "| rows | scores | truth | PASS | FAIL | INCONCLUSIVE |\n|---|---|---|---|---|---|"
    )
    with ProcessPoolExecutor() as pool:
        for n, kind, truth, gain, gate, candidates in lines:
            one = partial(verdict, n=n, gain=gain, kind=kind, gate=gate, candidates=candidates)
            some = draws * (
                5 if "can show" in truth else 1
            )  # ±1.3 % at 1,000 draws cannot separate 79 from 80
            found = list(pool.map(one, range(some), chunksize=25))
            passed, failed = found.count(PASS) / some, found.count(FAIL) / some
            print(
                f"| {n} | {kind} | {truth} | {passed:.1%} | {failed:.1%} "
                f"| {1 - passed - failed:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
