"""Answers are asked once: only what is new is asked, and scoring needs no model."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ft_assets.artifacts import ArtifactStore
from ft_assets.evaluation.kept_answers import Answers
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import artifact, failure, materialize, read
from ft_assets_tests.test_rerun import one_heldout_row

UP_TO_ANSWERS = "raw_dataset,chat_dataset,heldout_split,answers"


def answers(folder: Path) -> Answers:
    return Answers.read(artifact(folder, "answers"))


def generated(folder: Path) -> int:
    return ArtifactStore(folder / ".ft/store").need("answers", "tiny").metrics["generated_tokens"]


def tokens(asked: Answers, *candidates: str) -> int:
    rows = [
        row for side in asked.rows.values() for name in candidates for row in side.get(name, [])
    ]
    return sum(row.answer.tokens for row in rows if row.answer)


def test_every_candidate_is_asked_once(finished: Path) -> None:
    asked = answers(finished)
    assert list(asked.rows["heldout"]) == ["base", "few_shot", "sft", "dpo"]
    assert list(asked.rows["retention"]) == list(asked.rows["train"]) == ["base", "sft", "dpo"]
    assert generated(finished) == tokens(asked, "base", "few_shot", "sft", "dpo")
    report = read(finished, "eval_report", "report.json")
    for name, rows in asked.rows["heldout"].items():
        mean = sum(row.loss for row in rows) / len(rows)
        assert report["scores"][name]["loss"] == pytest.approx(mean)


def test_changed_reference_asks_for_its_loss_alone(copy: Path) -> None:
    before = answers(copy)
    one_heldout_row(copy)
    assert materialize(copy, UP_TO_ANSWERS).success
    after = answers(copy)
    assert generated(copy) == 0
    changed = set()
    for name, rows in after.rows["heldout"].items():
        was = {row.answer.key: row for row in before.rows["heldout"][name] if row.answer}
        for row in rows:
            assert row.answer is not None
            old = was[row.answer.key]
            assert row.answer == old.answer
            if row.loss_key != old.loss_key:
                assert (row.reference, old.reference) == ("yes yes", "yes")
                assert row.loss != old.loss
                changed.add((name, row.id))
    assert [name for name, _ in sorted(changed)] == ["base", "dpo", "few_shot", "sft"]
    materialize(copy, "eval_report")
    scored = pq.read_table(artifact(copy, "eval_report") / "rows.parquet").to_pylist()
    assert {row["exact"] for row in scored if row["reference"] == "yes yes"} == {0.0}


def test_new_adapter_is_asked_and_the_other_candidates_are_not(copy: Path) -> None:
    before = answers(copy)
    edit(copy, dpo={"beta": 0.2, "learning_rate": 2e-5})
    assert materialize(copy, "recipe,dpo_adapter,answers").success
    after = answers(copy)
    assert generated(copy) == tokens(after, "dpo") > 0
    for side in ("heldout", "retention", "train"):
        for name in before.rows[side].keys() - {"dpo"}:
            assert after.rows[side][name] == before.rows[side][name]


def test_longer_answers_are_asked_again(copy: Path) -> None:
    edit(copy, evaluation={"max_new_tokens": 9})
    assert materialize(copy, "recipe,answers").success
    assert generated(copy) == tokens(answers(copy), "base", "few_shot", "sft", "dpo")


def test_new_label_is_asked_and_nothing_is_generated(copy: Path) -> None:
    edit(copy, evaluation={"labels": ["yes", "no"], "metric": "label"})
    assert materialize(copy, "recipe,answers").success
    assert generated(copy) == 0
    before = answers(copy).rows["heldout"]["base"]
    assert {option.text for row in before for option in row.options} == {"yes", "no"}
    edit(copy, evaluation={"labels": ["yes", "no", "maybe"], "metric": "label"})
    assert materialize(copy, "recipe,answers").success
    assert generated(copy) == 0
    for row, old in zip(answers(copy).rows["heldout"]["base"], before, strict=True):
        assert row.options[:2] == old.options
        assert [option.text for option in row.options[2:]] == ["maybe"][: len(row.options)]


CHANGES: dict[str, dict[str, Any]] = {
    "a metric": {"evaluation": {"metrics": ["rouge", "bleu"], "metric": "rougeL"}},
    "the gate": {"gate": {"confidence": 0.9}},
    "a pattern": {"evaluation": {"regex": "yes|no", "metric": "regex"}},
    "own metric": {"evaluation": {"python": "scoring:score", "metric": "score"}},
}


def test_scores_need_no_model(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    for module in ("models.loading.load_base", "evaluation.candidate_proofs.load_base"):
        monkeypatch.setattr(f"ft_assets.{module}", refuse)
    (copy / "scoring.py").write_text("def score(answer, reference, _):\n    return len(answer)\n")
    before = artifact(copy, "answers")
    for change in CHANGES.values():
        report = artifact(copy, "eval_report")
        edit(copy, **change)
        result = materialize(copy, "recipe,answers,eval_report")
        assert "a model" not in failure(result)
        assert artifact(copy, "answers") == before
        assert artifact(copy, "eval_report") != report
    assert read(copy, "eval_report", "report.json")["metric"] == "score"


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "other settings": ({"evaluation": {"max_new_tokens": 7}}, "recipe", "setting evaluation"),
    "another adapter": ({"dpo": {"beta": 0.3}}, "recipe,dpo_adapter", "dpo_adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_answers_of_other_circumstances_are_not_scored(copy: Path, name: str) -> None:
    change, above, source = REFUSED[name]
    edit(copy, **change)
    assert materialize(copy, above).success
    said = failure(materialize(copy, "eval_report"))
    assert f"answers was made from another {source}" in said
    assert "materialize answers first" in said


def test_changed_files_of_answers_are_neither_scored_nor_kept(copy: Path) -> None:
    facts = artifact(copy, "answers") / "asked.json"
    facts.write_text(facts.read_text().replace('"logit_change": ', '"logit_change": 1'))
    edit(copy, evaluation={"metrics": ["chrf"]})
    said = failure(materialize(copy, "recipe,eval_report"))
    assert "asked.json: was changed after it was published" in said
    edit(copy, dpo={"beta": 0.2})
    assert materialize(copy, "recipe,dpo_adapter,answers").success
    assert generated(copy) == tokens(answers(copy), "base", "few_shot", "sft", "dpo")
