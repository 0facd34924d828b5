"""Break a pipeline in five common ways, and test that the diagnosis names each cause.

A healthy pipeline has no cause.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ft_assets.config import GateSettings
from ft_assets.evaluation.report_model import Diversity, ValidationLoss, Verdict
from ft_assets.evaluation.verdict.diagnosis import diagnose
from ft_assets_tests.factories import WORDS, conversations, write_jsonl
from ft_assets_tests.pipeline import UP_TO_REPORT, checks, materialize, read
from ft_assets_tests.reports import EVIDENCE, empty_report

FOREIGN = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def causes(folder: Path) -> list[str]:
    return [finding["cause"] for finding in read(folder, "eval_report", "diagnosis.json")]


def test_healthy_pipeline_passes_and_names_no_cause(healthy: Callable[..., Path]) -> None:
    folder = healthy()
    result = materialize(folder, UP_TO_REPORT)
    verdict = read(folder, "eval_report", "verdict.json")
    assert verdict["status"] == "PASS", verdict["reasons"]
    assert causes(folder) == []
    assert all(
        check.passed for name, check in checks(result).items() if name != "better_than_prompting"
    )


def test_healthy_pipeline_with_too_few_rows_cannot_tell_and_names_no_cause(
    healthy: Callable[..., Path],
) -> None:
    folder = healthy(gate={"min_heldout_rows": 1000})
    materialize(folder, UP_TO_REPORT)
    assert read(folder, "eval_report", "verdict.json")["status"] == "INCONCLUSIVE"
    assert causes(folder) == []


def test_foreign_template_is_named(healthy: Callable[..., Path]) -> None:
    folder = healthy(
        chat={"chat_template": "template.jinja"}, sft={"max_steps": 2, "learning_rate": 1e-4}
    )
    (folder / "template.jinja").write_text(FOREIGN)
    materialize(folder, UP_TO_REPORT)
    named = ["template mismatch", "undertrained"]  # it took two steps
    assert causes(folder) == named, read(folder, "eval_report", "verdict.json")


def test_narrow_data_is_named(healthy: Callable[..., Path]) -> None:
    folder = healthy(data={"rehearsal": []})
    write_jsonl(folder / "data/train.jsonl", conversations(240, lambda _: "yes"))
    result = materialize(folder, UP_TO_REPORT)
    assert causes(folder) == ["training data too narrow"], read(
        folder, "eval_report", "verdict.json"
    )
    assert read(folder, "eval_report", "verdict.json")["status"] == "FAIL"
    assert not checks(result)["nothing_forgotten"].passed


def test_overfit_is_named(healthy: Callable[..., Path]) -> None:
    folder = healthy(sft={"num_train_epochs": 25, "keep": "last"})
    chance = random.Random(0)
    # The answers are random: the model can only memorize them.
    write_jsonl(folder / "data/train.jsonl", conversations(120, lambda _: chance.choice(WORDS)))
    materialize(folder, UP_TO_REPORT)
    assert causes(folder) == ["overfit"], read(folder, "eval_report", "verdict.json")


def test_wrong_base_is_named(healthy: Callable[..., Path], tiny_model: Path) -> None:
    folder = healthy(
        base_models={"tiny": {"folder": str(tiny_model)}},
        sft={"max_steps": 2, "learning_rate": 1e-4},
    )
    materialize(folder, UP_TO_REPORT)
    named = ["undertrained", "wrong base model"]  # it took two steps
    assert causes(folder) == named, read(folder, "eval_report", "verdict.json")


def test_undertrained_is_named_and_not_told_to_train_less(healthy: Callable[..., Path]) -> None:
    folder = healthy(sft={"max_steps": 2, "learning_rate": 1e-5})
    materialize(folder, UP_TO_REPORT)
    assert causes(folder) == ["undertrained"], read(folder, "eval_report", "verdict.json")
    (finding,) = read(folder, "eval_report", "diagnosis.json")
    assert "SFT took 2 steps" in finding["evidence"][-1]
    assert "fewer epochs" not in finding["try"]


def named(rows: int = 64, **evidence: Any) -> list[str]:
    """Return the causes of a report without a PASS."""
    losses = {"base": 2.0, "sft": 1.0}
    scores = {name: {"exact": 0.5, "loss": loss, "stop_rate": 1.0} for name, loss in losses.items()}
    report = empty_report(
        heldout_rows=rows, scores=scores, evidence=EVIDENCE.model_copy(update=evidence)
    )
    verdict = Verdict(
        status="INCONCLUSIVE",
        candidate=None,
        reported_candidate="sft",
        reasons=[],
        dpo=None,
        candidates={},
        bound_to={},
    )
    return [finding.cause for finding in diagnose(report, verdict, GateSettings())]


SPREAD = Diversity(rows=200, distinct_prompts=1.0, answer_entropy_bits=5.0, top_answer=0.1)
LOSSES = {
    "fell": {"base": 2.0, "sft": 1.0},
    "hardly fell": {"base": 2.0, "sft": 1.85},
}


def measured(*losses: float) -> list[ValidationLoss]:
    return [
        ValidationLoss(epoch=index, step=10 * index, validation_loss=loss)
        for index, loss in enumerate(losses)
    ]


def test_cause_of_a_training_is_undertrained_only_by_evidence() -> None:
    trained = {"train": SPREAD, "train_loss": LOSSES["fell"], "steps": 100}
    assert named(**trained) == []
    assert named(**{**trained, "train_loss": LOSSES["hardly fell"]}) == ["undertrained"]
    assert named(**{**trained, "steps": 4}) == ["undertrained"]
    falling = {**trained, "validation": measured(2.0, 1.5, 1.2), "kept_is_last": True}
    assert named(**falling) == ["undertrained"]
    # Later epochs were worse, and their weights were not kept.
    assert named(**{**falling, "kept_is_last": False}) == []
    assert named(**{**falling, "validation": measured(2.0, 1.5, 1.49)}) == []


def test_few_answers_suggest_no_cause() -> None:
    narrow = {"train": SPREAD.model_copy(update={"top_answer": 1.0}), "train_loss": LOSSES["fell"]}
    assert named(**narrow) == ["training data too narrow"]
    assert named(rows=19, **narrow) == []
