"""`data.rehearsal: self`: the base's own answers to general prompts, trained beside the task."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ft_assets.artifacts import open_store
from ft_assets.assets import declared
from ft_assets.assets.own_rehearsal import answers_of_others
from ft_assets.commands.status import left_out, left_out_counts
from ft_assets.config import load_project
from ft_assets.data.canonical import prompt
from ft_assets.data.tables import read_table
from ft_assets.errors import ConfigError
from ft_assets.inference.generation import Answer
from ft_assets.steps.own_rehearsal import SHIPPED, flaw
from ft_assets.views.row_tokens import RowReader
from ft_assets.views.rows import RowFinder, Wanted
from ft_assets_tests.factories import edit, write_jsonl
from ft_assets_tests.pipeline import artifact, checks, failure, general, materialize

UP_TO_SPLIT = (
    "raw_dataset,raw_preferences,base_model,recipe,own_rehearsal,chat_dataset,heldout_split"
)


def answer(text: str, stopped: bool = True) -> Answer:
    return Answer(text, stopped, len(text), ())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (answer("A bridge joins two banks of a river."), ""),
        (answer("富士山は静岡県と山梨県にまたがる日本一高い山です。"), ""),
        (answer("yes"), ""),
        (answer("one and two and three", stopped=False), "cut off"),
        (answer(" \n"), "empty"),
        (answer("the sea is blue and deep. " * 4), "repetitive"),
        (answer("これはとてもいいことです。" * 4), "repetitive"),
    ],
)
def test_answer_that_is_not_worth_learning_is_named(given: Answer, expected: str) -> None:
    assert flaw(given) == expected


def test_shipped_prompts_are_many_distinct_and_in_many_scripts() -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    rows = [prompt({"prompt": line}) for line in lines]
    assert len({row["group"] for row in rows}) == len(rows) >= 200
    assert max(map(len, lines)) <= 200
    assert sum(not line.isascii() for line in lines) >= 30


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"rehearsal": "self", "rehearsal_self": False}, None),
        ({"rehearsal": ["self"]}, None),
        ({"rehearsal": ["self", "data/general.jsonl"]}, "stands alone"),
        ({"rehearsal": ["a.jsonl"], "rehearsal_self": True}, "drop one"),
        ({"rehearsal_prompts": ["a.jsonl"]}, "rehearsal_prompts is of `rehearsal: self`"),
        ({"rehearsal_max_new_tokens": 64}, "rehearsal_max_new_tokens is of"),
    ],
)
def test_setting_is_read_or_refused(project: Path, data: dict[str, Any], found: str | None) -> None:
    assert "own_rehearsal" not in _assets(project)
    edit(project, data=data)
    if found is None:
        edit(project, advise={}, audit={})
        assert "own_rehearsal" in _assets(project)
        settings = load_project(project / "finetune.yaml")
        readers = {
            one.name
            for one in declared().of(settings).assets
            if "own_rehearsal" in one.also(settings)
        }
        assert readers == {"chat_dataset", "advice", "row_audit"}
        return
    with pytest.raises(ConfigError, match=found):
        _assets(project)


def test_answers_of_other_bases_are_known_as_far_as_they_are_made(
    project: Path, tiny_model: Path
) -> None:
    edit(project, base_models={name: {"folder": str(tiny_model)} for name in ("b", "c")})

    def known(name: str) -> list[Any]:
        store = SimpleNamespace(current=lambda asset, base: None if base == "c" else (asset, base))
        loaded = load_project(project / "finetune.yaml")
        given: Any = SimpleNamespace(project=loaded, store=store)
        return answers_of_others(given, name)

    assert known("tiny") == []
    edit(project, data={"rehearsal": "self"})
    assert [known(name) for name in ("tiny", "c")] == [
        [("own_rehearsal", "b")],
        [("own_rehearsal", "b"), ("own_rehearsal", "tiny")],
    ]


def _assets(folder: Path) -> list[str]:
    return [one.name for one in declared().of(load_project(folder / "finetune.yaml")).assets]


@pytest.mark.graph
def test_own_answers_are_rehearsed_and_the_others_are_named(healthy: Callable[..., Path]) -> None:
    """Prompts of the general rows that measure forgetting are answered, and then left out."""
    folder = healthy()
    rows = [*general(60, start=5000), *general(4, start=9000)]
    write_jsonl(folder / "data/prompts.jsonl", [*rows, {"prompt": "<|im_start|> forged"}])
    settings = {"rehearsal": "self", "rehearsal_prompts": ["data/prompts.jsonl"]}
    edit(folder, data={**settings, "rehearsal_max_new_tokens": 8})
    made = materialize(folder, UP_TO_SPLIT)
    assert made.success, failure(made)
    assert checks(made)["base_answers_general_prompts"].passed
    assert checks(made)["nothing_leaks"].passed
    project = load_project(folder / "finetune.yaml")
    store = open_store(project)
    own, split = store.need("own_rehearsal", "tiny"), store.need("heldout_split", "tiny")
    answers = read_table(own.path / "rehearsal.parquet")
    assert own.metrics["prompts"] == 65
    assert 40 <= len(answers) == own.metrics["rows"]
    assert len(read_table(own.path / "info/rejected.parquet")) == 65 - len(answers)
    assert own.metrics["left_out_template"] == 1
    # The same rows, as raw_dataset would give them.
    rehearsed = read_table(artifact(folder, "chat_dataset") / "rehearsal.parquet")
    assert [row["id"] for row in rehearsed] == [row["id"] for row in answers]
    copied = split.metrics["rehearsal_rows_removed"]
    assert 0 < copied <= 4
    assert split.metrics["rehearsal_rows"] == len(answers) - copied
    trained = {row["id"] for row in read_table(split.path / "train.parquet")}
    assert len(trained & {row["id"] for row in answers}) == len(answers) - copied

    reasons = left_out_counts(project, store, ["tiny"])["tiny"]
    assert (reasons["template"], reasons["same-prompt"]) == (1, copied)
    twins = [row for row in left_out(project)["tiny"] if row["reason"] == "same-prompt"]
    assert {row["where"].partition(":")[0] for row in twins} == {"prompts.jsonl"}
    finder = RowFinder(project, store, "tiny")
    found = finder.find(Wanted(table="own_rehearsal", side="left out"))
    assert [line.reason for line in found.lines] == ["same-prompt"] * copied
    found = finder.find(Wanted(table="own_rehearsal", side="train"), limit=1)
    (shown,) = RowReader(finder).show(found.lines[0], found.rows[0]).sequences
    learnt = "".join(piece.text for piece in shown.pieces if piece.learnt)
    assert learnt == found.rows[0]["messages"][-1]["content"] + "<|im_end|>"
    assert finder.find(Wanted(table="unused_answers")).total == 65 - len(answers)

    again = materialize(folder, "own_rehearsal,chat_dataset")
    (event,) = again.asset_materializations_for_node("own_rehearsal")
    assert event.metadata["reused"].value is True
