"""Verdicts on the same held-out rows are counted, and each has a higher confidence."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.assets.eval_report import earlier_verdicts
from ft_assets.config import GateSettings
from ft_assets.evaluation.report_markdown import use_sentence
from ft_assets.evaluation.report_model import EvalReport
from ft_assets.evaluation.verdict.spending import spent_confidence
from ft_assets.evaluation.verdict.uses import Uses, look_key
from ft_assets_tests.factories import edit, ft
from ft_assets_tests.reports import empty_report


def test_all_later_verdicts_cost_as_much_as_the_first() -> None:
    costs = [1 - spent_confidence(0.95, number) for number in range(1, 5000)]
    assert costs[0] == pytest.approx(0.05)
    assert sum(costs[1:]) == pytest.approx(0.05, rel=1e-3)
    assert costs[1:] == sorted(costs[1:], reverse=True)


def test_year_of_equal_models_on_the_same_rows_rarely_passes_once() -> None:
    """Each week's model answers like the base on average; the base's answers stay the same."""
    chance, years, passed, naive = np.random.default_rng(0), 400, 0, 0
    for _ in range(years):
        right = chance.beta(0.6, 1.4, 64)
        base = chance.random(64) < right
        weeks = chance.random((52, 64)) < right
        p = []
        for answers in weeks:
            wins, losses = int((answers & ~base).sum()), int((~answers & base).sum())
            p.append(binomtest(wins, wins + losses).pvalue if wins > losses else 1.0)
        naive += any(value < 0.05 for value in p)
        passed += any(
            value < 1 - spent_confidence(0.95, number) for number, value in enumerate(p, 1)
        )
    assert passed / years <= 0.05
    assert naive / years >= 0.15  # without the series


def test_prompts_count_and_not_versions_of_the_rows() -> None:
    prompts = [f"prompt {number}" for number in range(100)]
    uses = Uses()
    for week in range(4):
        uses = uses.after(f"week {week}", prompts[: 90 + week])
    assert uses.number("week 4", prompts[:94]) == 5  # a row more each week is not a fresh set
    assert uses.number("week 2", prompts[:92]) == 3  # the same verdict again is not a new one
    assert uses.number("week 4", ["another one"]) == 1
    half = [*prompts[:45], *(f"fresh {number}" for number in range(45))]
    assert uses.number("week 4", half) == 3


def test_histories_are_joined_without_repetition() -> None:
    first = Uses().after("a", ["x"])
    left, right = first.after("b", ["x"]), first.after("c", ["x"])
    joined = Uses.joined([left, right])
    assert [look.key for look in joined.looks] == ["a", "b", "c"]
    assert joined.number("d", ["x"]) == 4


def test_report_describes_the_count_and_when_to_bring_fresh_rows() -> None:
    report = empty_report(gate_confidence=0.95, verdict_number=1, confidence=0.95)
    assert use_sentence(report).startswith("verdict 1 on these held-out rows")
    seventh = report.model_copy(
        update={"verdict_number": 7, "confidence": spent_confidence(0.95, 7)}
    )
    assert "verdict 7 on these held-out rows" in use_sentence(seventh)
    assert "Bring fresh rows" in use_sentence(seventh)


def _report_of(folder: Path) -> tuple[EvalReport, Artifact]:
    report = ArtifactStore(folder / ".ft/store").need("eval_report", "tiny")
    return EvalReport.read(report.path / "report.json"), report


def test_retrained_model_on_the_same_rows_is_judged_at_a_higher_confidence(copy: Path) -> None:
    first, artifact = _report_of(copy)
    assert (first.verdict_number, first.confidence) == (1, 0.95)
    edit(copy, sft={"num_train_epochs": 5})
    done = ft(copy, "run", "--asset", "*eval_report")
    second, artifact = _report_of(copy)
    assert second.verdict_number == 2, done.stdout + done.stderr
    assert second.confidence == pytest.approx(spent_confidence(0.95, 2))
    assert artifact.metrics["verdict_number"] == 2
    # Without its history, e.g. of an older version, a report is still one verdict.
    (artifact.path / "info/uses.json").unlink()
    store = ArtifactStore(copy / ".ft/store")
    assert len(earlier_verdicts(store, "tiny").looks) == 2


def test_history_of_a_report_that_cannot_be_read_counts_as_a_verdict(copy: Path) -> None:
    _, artifact = _report_of(copy)
    (artifact.path / "info/uses.json").unlink()
    (artifact.path / "rows.parquet").write_bytes(b"damaged")
    uses = earlier_verdicts(ArtifactStore(copy / ".ft/store"), "tiny")
    assert uses.number("another", ["any prompt"]) == 2


def test_gate_of_another_confidence_does_not_judge_an_old_report(copy: Path) -> None:
    edit(copy, gate={"confidence": 0.99})
    done = ft(copy, "run", "--asset", "merged_model")
    assert done.returncode != 0
    assert "confidence of 0.95" in done.stdout + done.stderr


def test_key_of_a_verdict_changes_with_what_is_judged_and_how() -> None:
    gate = GateSettings().model_dump(mode="json")
    key = look_key({"lora_adapter": "a"}, gate)
    assert key == look_key({"lora_adapter": "a"}, dict(gate))
    assert key != look_key({"lora_adapter": "b"}, gate)
    assert key != look_key({"lora_adapter": "a"}, {**gate, "metrics": {"exact": 0.1}})
