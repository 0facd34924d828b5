"""`gate.seeds`: the gain over several trainings, and an interval that holds their variance."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.evaluation.report import summarise
from ft_assets.evaluation.report_model import Difference, EvalReport
from ft_assets.evaluation.scored_rows import Scored
from ft_assets.evaluation.verdict.decision import decide
from ft_assets.evaluation.verdict.seeds import seed_spread
from ft_assets.models.adapter_files import of_seed
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import UP_TO_REPORT, artifact, failure, materialize, read
from ft_assets_tests.reports import EVIDENCE, scored_row

THREE = GateSettings(seeds=3)


def difference(mean: float, reach: float) -> Difference:
    return Difference(
        mean=mean,
        low=mean - reach,
        high=mean + reach,
        wins=9,
        losses=2,
        ties=53,
        n=64,
        test="McNemar",
        p=0.01,
        detectable=0.1,
        rows_needed=60,
    )


def test_interval_joins_rows_and_seeds() -> None:
    spread = seed_spread([0.2, 0.3, 0.4], difference(0.3, 0.1), 0.95)
    of_seeds = 4.302653 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom
    reach = math.hypot(0.1, of_seeds)
    assert spread.low == pytest.approx(0.3 - reach, abs=1e-5)
    assert spread.high == pytest.approx(0.3 + reach, abs=1e-5)
    assert spread.deviation == pytest.approx(0.1)
    alike = seed_spread([0.3, 0.3], difference(0.3, 0.1), 0.95)
    assert (alike.low, alike.high) == (pytest.approx(0.2), pytest.approx(0.4))


def test_interval_covers_the_gain_of_the_recipe() -> None:
    """Three seeds whose gains vary by 0.1, and 64 rows: one model's interval covers too little."""
    chance = np.random.default_rng(0)
    covered = alone = 0
    draws = 400
    for _ in range(draws):
        rows = chance.normal(0.3, 0.4, 64)
        seeds = chance.normal(0, 0.1, 3)[:, None] + rows + chance.normal(0, 0.2, (3, 64))
        gains = seeds.mean(axis=1)
        mean = seeds.mean(axis=0)
        reach = 2.0 * float(mean.std(ddof=1)) / 8
        spread = seed_spread(gains.tolist(), difference(float(mean.mean()), reach), 0.95)
        covered += spread.low <= 0.3 <= spread.high
        one = 2.0 * float(seeds[0].std(ddof=1)) / 8
        alone += abs(float(gains[0]) - 0.3) <= one
    assert covered / draws > 0.94
    assert alone / draws < 0.85


def report(*right: int, n: int = 64) -> EvalReport:
    """Return the report of a base that is always wrong, and of seeds that are right so often."""
    seeds = [
        [scored_row("answer", exact=float(index < count)) for index in range(n)] for count in right
    ]
    base = [scored_row("answer", exact=0.0) for _ in range(n)]
    scored = Scored(heldout={"base": base, "sft": seeds[0]}, seeds={"sft": seeds[1:]})
    if len(seeds) == 1:
        scored.seeds = {}
    return summarise(scored, EvaluationSettings(), GateSettings(), {}, EVIDENCE)


def test_gain_of_one_seed_alone_does_not_pass() -> None:
    lucky = report(30, 0, 0)
    assert decide(lucky, GateSettings()).status == "PASS"
    verdict = decide(lucky, THREE)
    assert verdict.status == "INCONCLUSIVE"
    assert "may be luck of the seed: exact +0.156 against base" in verdict.reasons[0]
    assert "over 3 seeds (+0.469, +0.000, +0.000; deviation 0.271)" in verdict.reasons[0]
    verdict = decide(report(30, 28, 32), THREE)
    assert verdict.status == "PASS"
    assert "not luck of the seed: exact +0.469 against base" in "; ".join(verdict.reasons)


def test_report_of_fewer_seeds_than_the_gate_asks_for_does_not_pass() -> None:
    verdict = decide(report(40), THREE)
    assert verdict.status == "INCONCLUSIVE"
    assert "gate.seeds is 3, and the report has 1" in verdict.reasons[0]


def test_two_seeds_are_trained_judged_and_only_the_first_is_kept_for_the_merge(
    make_project: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = make_project(tmp_path / "project")
    edit(folder, gate={"seeds": 2}, sft={"max_steps": 4}, dpo={"max_steps": 2})
    result = materialize(folder, UP_TO_REPORT)
    report = read(folder, "eval_report", "report.json")
    for name, asset in (("sft", "lora_adapter"), ("dpo", "dpo_adapter")):
        adapter = artifact(folder, asset)
        first, second = (
            load_file(of_seed(adapter, number) / "adapter_model.safetensors") for number in (0, 1)
        )
        assert first.keys() == second.keys(), failure(result)
        assert any(not first[key].equal(second[key]) for key in first)
        assert (of_seed(adapter, 1) / "trained_groups.json").exists()
        gains = report["seeds"][name]["gains"]
        assert len(gains) == 2
        assert gains[0] == pytest.approx(report["comparisons"][name]["base"]["exact"]["mean"])
    assert list(report["scores"]) == ["base", "few_shot", "sft", "dpo"]
    text = (artifact(folder, "eval_report") / "report.md").read_text()
    assert "over 2 seeds" in text
