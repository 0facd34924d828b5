"""What passes, what fails, what cannot tell; which candidate leaves; what may not be forgotten."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ft_assets.config import GateSettings
from ft_assets.errors import VerdictError
from ft_assets.evaluation.report import RIVALS
from ft_assets.evaluation.report_model import Difference, EvalReport, Proofs, Retention
from ft_assets.evaluation.verdict.decision import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    decide,
    losses_on_general_prompts,
)
from ft_assets.evaluation.verdict.gate import BOUND, require_pass
from ft_assets.evaluation.verdict.statistics import compare
from ft_assets_tests.reports import empty_report

GATE = GateSettings(min_heldout_rows=20)
ALL, NONE, HALF = [1.0] * 60, [0.0] * 60, [1.0, 0.0] * 30
SAME = [2.0, 2.1, 1.9, 2.0] * 10


def means(
    rows: list[float], stop: float = 1.0, refused: float = 0.0, repetition: float = 0.0
) -> dict[str, float]:
    return {
        "exact": sum(rows) / len(rows),
        "stop_rate": stop,
        "refused": refused,
        "repetition": repetition,
    }


def report(
    base: list[float],
    sft: list[float],
    dpo: list[float] | None = None,
    rl: list[float] | None = None,
    few_shot: list[float] | None = None,
    general: dict[str, list[float]] | None = None,
    more: dict[str, tuple[list[float], list[float]]] | None = None,
    mismatches: list[str] | None = None,
    **habits: float,
) -> EvalReport:
    """Build a report of given scores a row.

    general: the loss of general prompts by candidate. more: other metrics, as (base, SFT).
    """
    rows = (
        {"base": base, "sft": sft}
        | ({"dpo": dpo} if dpo else {})
        | ({"rl": rl} if rl else {})
        | ({"few_shot": few_shot} if few_shot else {})
    )

    def entries(
        columns: dict[str, list[float]], lower: bool = False
    ) -> dict[str, dict[str, Difference]]:
        return {
            name: {
                rival: compare(columns[name], columns[rival], 0.95, 1, lower)
                for rival in others
                if rival in columns
            }
            for name, others in RIVALS.items()
            if name in columns
        }

    comparisons = {
        name: {rival: {"exact": entry} for rival, entry in found.items()}
        for name, found in entries(rows).items()
    }
    for metric, (of_base, of_sft) in (more or {}).items():
        comparisons["sft"]["base"][metric] = compare(of_sft, of_base, 0.95, 1)
    retention = None
    if general:
        losses = entries(general, lower=True)
        task = compare([0.5, 0.6] * 20, [0.5, 0.6] * 20, 0.95, 1)
        retention = Retention(
            metric="chrf",
            rows=len(SAME),
            answered=len(SAME),
            scores={name: means([0.0]) for name in general},
            comparisons={
                name: {rival: {"loss": entry, "chrf": task} for rival, entry in found.items()}
                for name, found in losses.items()
            },
        )
    return empty_report(
        heldout_rows=len(base),
        scores={
            name: means(values, **(habits if name in RIVALS else {}))
            for name, values in rows.items()
        },
        comparisons=comparisons,
        retention=retention,
        proofs=Proofs(adapters={}, template_mismatches=mismatches or []),
    )


@pytest.mark.parametrize(
    ("numbers", "status", "candidate"),
    [
        (report(NONE, HALF), PASS, "sft"),
        (report(HALF, HALF), INCONCLUSIVE, None),  # a tie is no pass
        (report(HALF, NONE), FAIL, None),
        (report(NONE, ALL, stop=0.5), FAIL, None),
        (report(NONE, ALL, refused=0.2), FAIL, None),
        (report(NONE, ALL, repetition=0.5), FAIL, None),
        (report(NONE, ALL, mismatches=["row"]), FAIL, None),
        (report(NONE[:10], ALL[:10]), INCONCLUSIVE, None),  # too few rows
        (report(NONE, HALF, dpo=ALL), PASS, "dpo"),
        (report(NONE, ALL, dpo=HALF), PASS, "sft"),  # DPO hurts: SFT leaves
        (report(HALF, NONE, dpo=ALL), PASS, "dpo"),  # SFT hurts, DPO mends it
        (report(NONE, [1.0, *NONE[1:]]), INCONCLUSIVE, None),  # one lucky row
    ],
)
def test_verdict(numbers: EvalReport, status: str, candidate: str | None) -> None:
    verdict = decide(numbers, GATE)
    assert (verdict.status, verdict.candidate) == (status, candidate)


def test_inconclusive_says_what_these_rows_can_show_and_how_many_would_decide() -> None:
    text = " ".join(decide(report(NONE, [1.0, 1.0, *NONE[2:]]), GATE).reasons)
    assert "held-out rows would decide" in text
    assert "60 rows find a difference of" in text


def test_forgetting_fails_by_its_own_name_though_the_task_got_better() -> None:
    verdict = decide(
        report(NONE, ALL, general={"base": SAME, "sft": [value + 0.5 for value in SAME]}), GATE
    )
    assert verdict.status == FAIL
    assert "forgets: loss of general prompts +0.500 nats/token" in verdict.reasons[0]


def test_retention_that_may_be_beyond_the_tolerance_cannot_be_told() -> None:
    noisy = [value + (0.8 if index % 4 == 0 else -0.05) for index, value in enumerate(SAME)]
    verdict = decide(report(NONE, ALL, general={"base": SAME, "sft": noisy}), GATE)
    assert verdict.status == INCONCLUSIVE
    assert "may forget" in verdict.reasons[0]


def test_dpo_that_forgets_more_than_sft_stays_behind() -> None:
    general = {
        "base": SAME,
        "sft": SAME,
        "dpo": [value + 0.05 + index / 1000 for index, value in enumerate(SAME)],
    }
    verdict = decide(report(NONE, HALF, dpo=HALF, general=general), GATE)
    assert (verdict.status, verdict.candidate) == (PASS, "sft")
    assert "forgets more than SFT" in verdict.dpo


def test_lower_dpo_leaves_only_within_the_declared_margin() -> None:
    slightly = [*ALL[:-1], 0.0]
    numbers = report(NONE, ALL, dpo=slightly)
    assert decide(numbers, GATE).candidate == "sft"
    assert decide(numbers, GATE.model_copy(update={"dpo_margin": 0.05})).candidate == "dpo"


@pytest.mark.parametrize(
    ("dpo", "rl", "candidate"),
    [
        (None, ALL, "rl"),
        (ALL, [*ALL[:-1], 0.0], "dpo"),
        ([*ALL[:-1], 0.0], ALL, "rl"),
        (ALL, NONE, "dpo"),  # RL hurts
        (None, NONE, "sft"),
    ],
)
def test_better_one_of_dpo_and_rl_leaves_and_none_that_hurts(
    dpo: list[float] | None, rl: list[float], candidate: str
) -> None:
    verdict = decide(report(NONE, HALF, dpo=dpo, rl=rl), GATE)
    assert (verdict.status, verdict.candidate) == (PASS, candidate)
    assert (verdict.rl or "").startswith("lower than SFT") == (rl == NONE)


def test_three_candidates_are_corrected_together() -> None:
    """Six wins alone have p = 0.031; among three candidates 0.094."""
    six = [*[1.0] * 6, *NONE[6:]]
    assert decide(report(NONE, six), GATE).status == PASS
    assert decide(report(NONE, six, dpo=six, rl=six), GATE).status == INCONCLUSIVE


def test_reward_is_hacked_if_it_rose_and_the_metric_fell() -> None:
    numbers = report(NONE, HALF, rl=[*[1.0] * 10, *NONE[10:]])
    against_sft = numbers.comparisons["rl"]["sft"]
    against_sft["long"] = compare(ALL, NONE, 0.95, 1)
    hacked = numbers.model_copy(update={"rewards": {"long": 1.0}})
    judged = decide(hacked, GATE).candidates["rl"]
    assert judged.status == FAIL
    assert judged.reasons[0].startswith("the reward was hacked: long +1.000")
    for rewards in ({"exact": 1.0}, {"long": -1.0}, None):
        other = numbers.model_copy(update={"rewards": rewards})
        assert decide(other, GATE).candidates["rl"].status == PASS


def test_verdict_about_rl_is_refused_once_rl_is_removed(tmp_path: Path) -> None:
    versions: dict[str, str] = dict.fromkeys(BOUND, "v")
    numbers = report(NONE, HALF).model_copy(update={"bound_to": {**versions}})
    (tmp_path / "report.json").write_text(numbers.model_dump_json())
    made: Any = SimpleNamespace(path=tmp_path)
    assert require_pass(made, versions, GATE, "here", lambda _: None).status == PASS
    del versions["rl_adapter"]
    with pytest.raises(VerdictError, match=r"about another rl_adapter \(v, now None\)"):
        require_pass(made, versions, GATE, "here", lambda _: None)


def test_margin_passes_what_is_not_worse_and_only_then() -> None:
    gate = GateSettings(metrics={"exact": 0.1})
    assert decide(report(HALF, HALF), gate).status == PASS
    assert "not worse than the base by 0.1" in decide(report(HALF, HALF), gate).reasons[0]
    tight = decide(report(HALF, HALF), GateSettings(metrics={"exact": 0.05}))
    assert tight.status == INCONCLUSIVE  # 60 equal answers can hide a loss of 0.06
    noise = [1.0, 0.0] * 15 + [0.0, 1.0] * 15  # as good on the mean, but any row may differ
    assert decide(report(HALF, noise), gate).status == INCONCLUSIVE
    assert decide(report(HALF, NONE), gate).status == FAIL


def test_all_of_several_metrics_must_be_better_by_default() -> None:
    gate = GateSettings(metrics={"exact": "better", "regex": "better"})
    both = report(NONE, HALF, more={"regex": (NONE, HALF)})
    assert decide(both, gate).status == PASS
    one = decide(report(NONE, HALF, more={"regex": (HALF, HALF)}), gate)
    assert one.status == INCONCLUSIVE
    assert "cannot tell it from the base: regex" in one.reasons[0]
    assert decide(report(NONE, HALF, more={"regex": (HALF, NONE)}), gate).status == FAIL
    weak = [1.0] * 6 + [0.0] * 54  # p 0.03: enough for each, because both are needed
    assert decide(report(NONE, weak, more={"regex": (NONE, weak)}), gate).status == PASS


def test_one_of_several_metrics_must_survive_holm_and_none_may_be_worse() -> None:
    gate = GateSettings(
        metrics={"exact": "better", "regex": "better", "label": "better"}, better="any"
    )
    weak = [1.0] * 6 + [0.0] * 54  # p 0.03: enough alone, not as the best of three
    assert (
        decide(report(NONE, weak, more={"regex": (HALF, HALF), "label": (HALF, HALF)}), GATE).status
        == PASS
    )
    assert (
        decide(report(NONE, weak, more={"regex": (HALF, HALF), "label": (HALF, HALF)}), gate).status
        == INCONCLUSIVE
    )
    assert (
        decide(report(NONE, HALF, more={"regex": (HALF, HALF), "label": (HALF, HALF)}), gate).status
        == PASS
    )
    assert (
        decide(report(NONE, HALF, more={"regex": (HALF, NONE), "label": (HALF, HALF)}), gate).status
        == FAIL
    )


def test_prompted_base_that_is_as_good_blocks_only_if_the_gate_says_so() -> None:
    numbers = report(NONE, HALF, few_shot=HALF)
    assert decide(numbers, GATE).status == PASS
    strict = decide(numbers, GATE.model_copy(update={"prompting": "fail"}))
    assert strict.status == INCONCLUSIVE
    assert "not shown to be better than prompting" in strict.reasons[0]
    better = decide(report(NONE, HALF, few_shot=ALL), GATE.model_copy(update={"prompting": "fail"}))
    assert better.status == FAIL
    assert "prompting is better than this fine-tune" in better.reasons[0]


def test_dpo_that_gains_on_heldout_may_cost_general_prompts_the_usual_tolerance() -> None:
    general = {
        "base": SAME,
        "sft": [value - 0.2 for value in SAME],
        "dpo": [value - 0.05 for value in SAME],
    }
    assert decide(report(NONE, HALF, dpo=ALL, general=general), GATE).candidate == "dpo"
    assert decide(report(NONE, HALF, dpo=HALF, general=general), GATE).candidate == "sft"


def test_two_candidates_are_two_chances_and_pay_for_it() -> None:
    lucky = [1.0] * 6 + [0.0] * 54  # p 0.03 alone
    assert decide(report(NONE, lucky), GATE).status == PASS
    assert decide(report(NONE, lucky, dpo=NONE), GATE).status == INCONCLUSIVE


def test_groups_and_not_rows_count_for_the_minimum() -> None:
    numbers = report(NONE, ALL).model_copy(update={"heldout_groups": 15})
    verdict = decide(numbers, GATE)
    assert verdict.status == INCONCLUSIVE
    assert "too few groups of held-out rows: 15 < 20 (60 rows)" in verdict.reasons[0]


def test_graded_metric_needs_more_rows_than_a_right_or_wrong_one() -> None:
    base, better = [0.30, 0.31] * 12, [0.60, 0.65, 0.62] * 8
    judged = decide(report(base, better), GATE)
    assert judged.status == INCONCLUSIVE
    assert "too few held-out rows for the graded metric exact: n=24, at least 36" in str(
        judged.reasons
    )
    assert decide(report(base * 2, better * 2), GATE).status == PASS


def test_few_general_prompts_cannot_prove_that_nothing_is_forgotten() -> None:
    few = {
        "base": SAME[:8],
        "sft": [value + 0.01 * (index % 2) for index, value in enumerate(SAME[:8])],
    }
    verdict = decide(report(NONE, ALL, general=few), GATE)
    assert verdict.status == INCONCLUSIVE
    assert "too few general prompts" in verdict.reasons[0]
    lowered = GATE.model_copy(update={"min_retention_rows": 8})
    assert decide(report(NONE, ALL, general=few), lowered).status == PASS


def test_verdict_is_decided_at_the_confidence_of_the_report() -> None:
    lucky = [1.0] * 7 + [0.0] * 53  # p 0.016
    numbers = report(NONE, lucky)
    assert decide(numbers, GATE).status == PASS
    later = numbers.model_copy(update={"confidence": 0.999})
    assert decide(later, GATE).status == INCONCLUSIVE


def test_number_of_rows_is_advice_only_where_it_can_be_reached() -> None:
    def judged(mean: float) -> str:
        drops = [mean - 0.1, mean + 0.1] * 20
        entry = compare([0.5 + value for value in drops], [0.5] * 40, 0.95, 1)
        numbers = report(NONE, ALL, general={"base": SAME, "sft": SAME})
        assert numbers.retention is not None
        numbers.retention.comparisons["sft"]["base"]["chrf"] = entry
        return str(decide(numbers, GATE).reasons)

    assert "about" in judged(-0.09)
    assert "too close to it for more rows to help" in judged(-0.0995)


def test_proven_loss_on_general_prompts_is_evidence_and_chance_is_not() -> None:
    def suspected(rises: list[float]) -> list[str]:
        sft = [value + rise for value, rise in zip(SAME, rises, strict=True)]
        numbers = report(NONE, ALL, general={"base": SAME, "sft": sft})
        assert decide(numbers, GATE).status == INCONCLUSIVE
        return losses_on_general_prompts("sft", numbers, GATE)

    assert "may forget" in suspected([0.19, 0.1, 0.28, 0.19] * 10)[0]
    assert suspected([1.0, -1.0, 0.9, -0.8] * 10) == []
