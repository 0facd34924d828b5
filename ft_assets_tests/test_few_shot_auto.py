"""`data.few_shot: auto`: the rival's examples are training rows with the best validation score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ft_assets.config import EvaluationSettings
from ft_assets.config.data import DataSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import EvaluationError
from ft_assets.evaluation import examples
from ft_assets.evaluation.examples import Pool, choose
from ft_assets.evaluation.kept_answers import AskedRow, GivenAnswer
from ft_assets.evaluation.scorer import Task
from ft_assets_tests.factories import conversations, next_word
from ft_assets_tests.pipeline import UP_TO_REPORT, artifact, materialize, read


def rows(count: int, start: int = 0) -> list[Any]:
    return [
        {
            **row,
            "id": f"row{index:03}",
            "group": f"row{index:03}",
            "reference": row["messages"][-1]["content"],
        }
        for index, row in enumerate(conversations(count, next_word, start), start)
    ]


class Asked:
    """Answers rightly where one of the good rows is an example; a long prompt is refused."""

    renderer = None

    def __init__(self, good: set[str], too_long: set[str] = frozenset()) -> None:  # type: ignore
        self.good = good
        self.too_long = too_long
        self.seen: list[list[str]] = []

    def heldout(self, asked: list[Any]) -> list[AskedRow]:
        prompt = str(asked[0]["messages"][:-1])
        if any(text in prompt for text in self.too_long):
            raise EvaluationError(where="a row", found="too long", expected="room", fix="shorten")
        right = any(text in prompt for text in self.good)
        self.seen.append([row["id"] for row in asked])
        return [
            AskedRow(
                row["id"],
                row["reference"],
                1.0 if right else 2.0,
                0.5,
                GivenAnswer(row["reference"] if right else "?", True, 1),
            )
            for row in asked
        ]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(examples, "tokenized", lambda renderer, asked: asked)
    return Pool(train=rows(60), validation=rows(20, start=100))


def question(row: Any) -> str:
    return row["messages"][0]["content"]


@pytest.mark.parametrize("metric", ["exact", "loss"])
def test_set_with_the_best_score_is_chosen(pool: Pool, metric: str) -> None:
    task = Task(heldout=[], settings=EvaluationSettings(metric=metric))
    sets = pool.sets(task.settings.seed)
    others = {question(row) for place in (0, 1, 3) for row in sets[place]}
    good = {question(row) for row in sets[2]} - others
    asker: Any = Asked(good)
    found, choice = choose(asker, pool, task)
    assert found == sets[2]
    assert choice.chosen == 2
    assert choice.metric == metric
    assert choice.tried[2].score == 1.0
    assert choice.tried[0].score == (2.0 if metric == "loss" else 0.0)
    assert found[0]["id"] in choice.describe()


def test_rows_to_choose_by_are_validation_rows_and_then_training_rows_of_no_set(
    pool: Pool,
) -> None:
    task = Task(heldout=[], settings=EvaluationSettings())
    asker: Any = Asked(set())
    found, choice = choose(asker, pool, task)
    assert (choice.chosen, choice.rows) == (0, 32)  # of equal ones the first
    assert len(asker.seen) == 4
    assert all(seen == asker.seen[0] for seen in asker.seen)
    assert set(asker.seen[0][:20]) == {row["id"] for row in pool.validation}
    drawn = {row["id"] for one in pool.sets(task.settings.seed) for row in one}
    assert not drawn & set(asker.seen[0])
    again = choose(Asked(set()), pool, task)  # type: ignore[arg-type]
    assert (found, choice) == again


def test_set_that_does_not_fit_is_left_out_and_none_that_fits_is_an_error(pool: Pool) -> None:
    task = Task(heldout=[], settings=EvaluationSettings())
    sets = pool.sets(task.settings.seed)
    long = {question(row) for row in sets[0]} - {question(row) for one in sets[1:] for row in one}
    asker: Any = Asked(set(), long)
    _, choice = choose(asker, pool, task)
    assert (choice.chosen, choice.tried[0].score) == (1, None)
    assert "not asked" in choice.describe()
    asker = Asked(set(), {"what is"})
    with pytest.raises(EvaluationError, match=r"none of 4 sets of 4 training rows .* too long"):
        choose(asker, pool, task)


def test_auto_is_read_and_is_not_mixed_with_files() -> None:
    data = DataSettings.model_validate({"train": ["a"], "few_shot": "auto"})
    assert (data.few_shot, data.few_shot_auto) == ([], True)
    assert DataSettings.model_validate(data.model_dump()) == data
    with pytest.raises(ValidationError, match="drop one"):
        DataSettings.model_validate({"train": ["a"], "few_shot": ["b"], "few_shot_auto": True})


def test_chosen_examples_are_training_rows_and_the_report_shows_them(
    healthy: Callable[..., Path],
) -> None:
    folder = healthy(data={"few_shot": "auto"}, sft={"max_steps": 2, "num_train_epochs": 1})
    materialize(folder, UP_TO_REPORT)
    report = read(folder, "eval_report", "report.json")
    choice = report["few_shot"]
    split = artifact(folder, "heldout_split")
    sides = {
        side: {row["id"] for row in read_table(split / f"{side}.parquet")}
        for side in ("train", "heldout")
    }
    tried = {row for one in choice["tried"] for row in one["rows"]}
    assert tried <= sides["train"]
    assert not tried & sides["heldout"]
    best = choice["tried"][choice["chosen"]]
    assert best["score"] == max(one["score"] for one in choice["tried"])
    assert "few_shot" in report["scores"]
    text = (artifact(folder, "eval_report") / "report.md").read_text()
    assert f"the best of 4 sets on {choice['rows']} rows that are not held out" in text
    kept = artifact(folder, "answers")
    assert materialize(folder, "answers").success
    assert artifact(folder, "answers") == kept
