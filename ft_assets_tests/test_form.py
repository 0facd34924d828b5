"""Form and content apart: a gain that rivals with the form alone have as well is not a PASS."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.evaluation import form
from ft_assets.evaluation.kept_answers import AskedOption, AskedRow, GivenAnswer
from ft_assets.evaluation.report import summarise
from ft_assets.evaluation.report_model import EvalReport
from ft_assets.evaluation.scored_rows import Scored
from ft_assets.evaluation.scorer import Scorer, Task
from ft_assets.evaluation.verdict.decision import decide
from ft_assets_tests.factories import conversations, write_jsonl
from ft_assets_tests.pipeline import UP_TO_REPORT, materialize, read
from ft_assets_tests.reports import EVIDENCE

LABELS = EvaluationSettings(labels=["Yes", "No"], metric="label")
EXACT = EvaluationSettings(metric="exact")


def tokenized(index: int, answer: str) -> Any:
    messages = [
        {"role": "user", "content": f"question {index}"},
        {"role": "assistant", "content": answer},
    ]
    row = {"id": f"row{index:03}", "group": f"row{index:03}", "messages": messages}
    return {**row, "reference": answer}


def asked(row: Any, answer: str, likely: str | None = None) -> AskedRow:
    labels = ("yes", "no") if likely and likely.islower() else ("Yes", "No")
    options = [AskedOption(label, -1.0 if label == likely else -2.0, 2) for label in labels]
    return AskedRow(
        row["id"],
        row["reference"],
        1.0,
        0.5,
        GivenAnswer(answer, True, 2),
        options if likely else [],
    )


def judged(
    truth: list[str],
    base: list[str],
    tuned: list[str],
    fitted: list[str],
    settings: EvaluationSettings = LABELS,
    likely: list[str] | None = None,
) -> EvalReport:
    """Return the report about the answers `tuned`; `fitted` are the ones to the trained rows.

    The held-out rows are the training rows again: they have the same shares of answers. likely: the
    label that the base holds most likely, for each row.
    """
    rows = [tokenized(index, answer) for index, answer in enumerate(truth)]
    scorer = Scorer(Task(heldout=rows, settings=settings, train=rows))
    likely = likely or [""] * len(rows)
    answers = {
        "base": [asked(*row) for row in zip(rows, base, likely, strict=True)],
        "sft": [asked(*row) for row in zip(rows, tuned, strict=True)],
    }
    assert form.has_few_answers(settings, rows)
    scored = Scored(heldout={name: scorer.heldout(its, None) for name, its in answers.items()})
    scored.rivals = form.rivals(answers["base"], rows, scorer)
    scored.train_rivals = form.rivals(answers["base"], rows, scorer)
    of_train = [asked(*row) for row in zip(rows, fitted, strict=True)]
    scored.train = {"sft": form.scored(of_train, scorer)}
    return summarise(scored, settings, GateSettings(), {}, EVIDENCE)


def reasons(report: EvalReport) -> tuple[str, str]:
    verdict = decide(report, GateSettings())
    return verdict.status, "; ".join(verdict.reasons)


TRUTH = ["Yes" if index % 5 < 3 else "No" for index in range(100)]  # 60 of 100


def flipped(answers: list[str], share: float) -> list[str]:
    chance = random.Random(0)
    wrong = set(chance.sample(range(len(answers)), round(share * len(answers))))
    return [
        ("No" if answer == "Yes" else "Yes") if index in wrong else answer
        for index, answer in enumerate(answers)
    ]


@pytest.mark.parametrize("settings", [LABELS, EXACT], ids=["label", "exact"])
def test_majority_answerer_is_not_a_gain(settings: EvaluationSettings) -> None:
    """The base writes whole sentences, or "No." for "No": its score is 0 by its form."""
    base = ["I would say no, because it depends."] * 100
    report = judged(TRUTH, base, ["Yes"] * 100, ["Yes"] * 100, settings)
    gain = report.comparisons["sft"]["base"][settings.metric]
    assert (gain.mean, gain.p < 1e-13) == (0.6, True)
    status, text = reasons(report)
    assert status == "INCONCLUSIVE"
    named = f"{settings.metric} +0.000 against the most frequent answer"
    assert f"the gain may be form alone: {named}" in text
    assert "not shown to fit its own training rows" in text
    lenient = decide(report, GateSettings(form="warn"))
    assert lenient.status == "PASS"
    assert f"warning: the gain may be form alone: {named}" in "; ".join(lenient.reasons)


def test_control_of_shuffled_labels_does_not_pass() -> None:
    """It learnt the shares of the labels, and nothing that its own rows have in common."""
    shuffled = random.Random(1).sample(TRUTH, 100)
    base = ["No." if answer == "No" else "It is yes." for answer in TRUTH]
    report = judged(TRUTH, base, shuffled, shuffled, EXACT)
    assert report.comparisons["sft"]["base"]["exact"].p < 1e-10
    status, text = reasons(report)
    assert status != "PASS"
    assert "form alone" in text


def test_base_that_knows_the_label_and_not_its_form_is_a_rival() -> None:
    """Held to the labels the base is right on 80 rows; the fine-tune is right on 80 others."""
    base = [f"The answer is {answer}, I think." for answer in TRUTH]
    tuned = flipped(TRUTH, 0.2)
    likely = list(reversed(flipped(list(reversed(TRUTH)), 0.2)))
    report = judged(TRUTH, base, tuned, TRUTH, LABELS, likely)
    assert report.form is not None
    entry = report.form.heldout["sft"][form.HELD]
    assert (entry.n, entry.mean) == (100, pytest.approx(0.0))
    status, text = reasons(report)
    assert status == "INCONCLUSIVE"
    assert "the gain may be form alone: label +0.000 against the base held" in text


def test_worse_than_the_form_is_a_fail() -> None:
    tuned = flipped(TRUTH, 0.5)
    report = judged(TRUTH, ["Hm."] * 100, tuned, TRUTH, LABELS, flipped(TRUTH, 0.1))
    status, text = reasons(report)
    assert status == "FAIL"
    assert "the gain is form alone: label -0.4" in text


def test_gain_beyond_the_form_passes_and_says_so() -> None:
    tuned = flipped(TRUTH, 0.05)
    report = judged(TRUTH, ["Hm."] * 100, tuned, tuned, LABELS, ["Yes"] * 100)
    status, text = reasons(report)
    assert status == "PASS"
    assert "more than the form of an answer: label +0.350 against the most frequent answer" in text
    assert "more than the form of an answer: label +0.350 against the base held" in text


def test_gain_on_heldout_rows_without_a_fit_of_the_training_rows_does_not_pass() -> None:
    """A held-out gain of a model that does not fit its own rows is luck."""
    fitted = random.Random(2).sample(TRUTH, 100)
    report = judged(TRUTH, ["Hm."] * 100, flipped(TRUTH, 0.2), fitted, LABELS, ["Yes"] * 100)
    status, text = reasons(report)
    assert status != "PASS"
    assert "own training rows" in text
    assert "form alone" not in text


def test_option_is_spelt_as_the_training_rows_spell_it() -> None:
    """By exact match a label of another case would make the base's score 0 by its form."""
    settings = EvaluationSettings(labels=["yes", "no"], metric="exact")
    report = judged(
        TRUTH, ["Hm."] * 100, flipped(TRUTH, 0.2), TRUTH, settings, [t.lower() for t in TRUTH]
    )
    assert report.form is not None
    assert report.form.heldout["sft"][form.HELD].mean == pytest.approx(-0.2)


def test_metrics_of_the_form_and_json_without_a_prompt_are_named() -> None:
    regex = EvaluationSettings(regex="Yes|No", metric="regex")
    assert form.why_not_measured(regex) == "regex is a metric of the form"
    fields = EvaluationSettings(json_fields=["a"], metric="field_f1")
    assert form.is_json(fields)
    assert "data.few_shot names no examples" in (form.why_not_measured(fields) or "")
    assert form.why_not_measured(EvaluationSettings()) is None
    assert not form.is_json(EvaluationSettings())


def test_distinct_answers_are_not_labels() -> None:
    rows = [tokenized(index, f"answer {index % 30}") for index in range(100)]
    assert not form.has_few_answers(EvaluationSettings(), rows)
    # The content of a tool call is empty; its reference is the call.
    calls = [{**row, "expected": f"call {index}"} for index, row in enumerate(rows)]
    nothing = [{"role": "assistant", "content": ""}]
    empty: list[Any] = [{**row, "messages": nothing} for row in calls]
    assert not form.has_few_answers(EvaluationSettings(), empty)
    assert form.has_few_answers(LABELS, rows)
    assert form.held_rows(3000, 77) == 27
    assert form.held_rows(64, 2) == 64
    assert form.held_rows(64, 2000) == 20


def test_model_trained_on_random_labels_does_not_pass(healthy: Callable[..., Path]) -> None:
    """The base answers with other words, so that the form alone is a gain of half of the rows."""
    chance = random.Random(0)
    folder = healthy(
        evaluation={"labels": ["yes", "no"], "metric": "label"}, sft={"num_train_epochs": 2}
    )
    rows = conversations(160, lambda _: chance.choice(["yes", "no"]))
    write_jsonl(folder / "data/train.jsonl", rows)
    materialize(folder, UP_TO_REPORT)
    report = read(folder, "eval_report", "report.json")
    gain = report["comparisons"]["sft"]["base"]["label"]
    assert (gain["mean"] > 0.3, gain["p"] < 1e-3) == (True, True)
    assert set(report["form"]["heldout"]["sft"]) == {form.MAJORITY, form.HELD}
    assert report["form"]["train"]["sft"][form.MAJORITY]["n"] == 64
    verdict = read(folder, "eval_report", "verdict.json")
    assert verdict["status"] != "PASS"
    assert "form alone" in "; ".join(verdict["reasons"])
