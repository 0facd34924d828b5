"""From files to the split, through the graph.

Cases: templates with a switch, plain texts, labelled answers, and rejected rows that are kept.
"""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.data.tables import read_table
from ft_assets_tests.factories import conversations, edit, write_jsonl
from ft_assets_tests.pipeline import artifact, checks, failure, materialize

UP_TO_SPLIT = "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split"
# As Qwen3's: an empty thinking block before the last answer only, unless thinking is switched off.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def two_turns(count: int) -> list[dict[str, Any]]:
    more = [{"role": "user", "content": "and then"}, {"role": "assistant", "content": "no"}]
    return [
        {"messages": [*row["messages"], *more]} for row in conversations(count, lambda _: "yes")
    ]


def metadata(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    (event,) = [
        event
        for event in result.get_asset_materialization_events()
        if event.asset_key == dg.AssetKey(asset)
    ]
    return {name: value.value for name, value in event.materialization.metadata.items()}


def test_template_that_writes_thinking_is_refused_until_its_switch_is_set(project: Path) -> None:
    (project / "thinking.jinja").write_text(THINKING)
    write_jsonl(project / "data/train.jsonl", two_turns(60))
    edit(project, chat={"chat_template": "thinking.jinja"})
    said = checks(materialize(project, UP_TO_SPLIT))["every_row_is_proven"]
    assert not said.passed
    assert "<think>" in (said.description or "")
    assert said.metadata["to_do"].value == "set chat.template_kwargs: {enable_thinking: false}"
    edit(
        project,
        chat={"chat_template": "thinking.jinja", "template_kwargs": {"enable_thinking": False}},
    )
    result = materialize(project, UP_TO_SPLIT)
    assert result.success, failure(result)
    assert checks(result)["every_row_is_proven"].passed
    assert metadata(result, "chat_dataset")["one_sequence_a_turn"] == 60
    split = artifact(project, "heldout_split")
    train, heldout = read_table(split / "train.parquet"), read_table(split / "heldout.parquet")
    assert {len(row["messages"]) for row in heldout} == {4}  # whole conversations are held out
    whole = [row for row in train if row["judged"]]
    assert len(train) == 2 * len(whole)
    first = next(row for row in train if not row["judged"])
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"]


def test_plain_texts_are_trained_whole_and_never_held_out(project: Path) -> None:
    write_jsonl(
        project / "data/books.jsonl",
        [{"text": f"once upon a river {number}"} for number in range(40)],
    )
    edit(project, data={"rehearsal": ["data/books.jsonl"]})
    rejected = checks(materialize(project, "raw_dataset"))["rows_are_valid"]
    assert not rejected.passed
    assert "format" in (
        rejected.description or ""
    )  # detection does not guess that a text is to be trained on
    edit(project, data={"format": {"rehearsal": "text"}})
    result = materialize(project, UP_TO_SPLIT)
    assert result.success, failure(result)
    split = artifact(project, "heldout_split")
    texts = [
        row for row in read_table(split / "train.parquet") if row["messages"][0]["role"] == "text"
    ]
    assert len(texts) == 40
    assert all(all(row["supervised"]) for row in texts)
    assert not [
        row for row in read_table(split / "heldout.parquet") if row["messages"][0]["role"] == "text"
    ]


def test_labelled_answers_become_pairs_and_lonely_ones_are_named(project: Path) -> None:
    rows = [
        {
            "prompt": f"which lamp is the blue one {number}",
            "completion": answer,
            "label": answer == "yes",
        }
        for number in range(10)
        for answer in ("yes", "no no")
    ]
    write_jsonl(
        project / "data/pairs.jsonl",
        [*rows, {"prompt": "alone", "completion": "yes", "label": True}],
    )
    said = checks(materialize(project, "raw_preferences"))["pairs_are_valid"]
    assert said.passed
    assert "1 labelled answers have no partner" in (said.description or "")
    made = artifact(project, "raw_preferences", partition=None)
    (lonely,) = read_table(made / "info" / "rejected.parquet")
    assert lonely["where"] == "pairs.jsonl:21"
    assert "is a good answer (label true); no bad answer" in lonely["problem"]
    pairs = read_table(made / "preferences.parquet")
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("yes", "no no")}
    assert len(pairs) == 10


def test_too_many_bad_rows_fail_the_check_keep_the_rows_and_hold_later_runs(project: Path) -> None:
    good = conversations(20, lambda _: "yes")
    write_jsonl(
        project / "data/train.jsonl",
        [*good, '{"messages": [', {"messages": [{"role": "user", "content": "so | what"}]}],
    )
    result = materialize(project, UP_TO_SPLIT)
    assert not result.success
    assert "2 of 22 rows of conversations cannot be used" in (
        checks(result)["rows_are_valid"].description or ""
    )
    kept = read_table(artifact(project, "raw_dataset", partition=None) / "info/rejected.parquet")
    assert [row["where"] for row in kept] == ["train.jsonl:21", "train.jsonl:22"]
    assert json.loads(kept[1]["row"]) == {"messages": [{"role": "user", "content": "so | what"}]}
    assert "so \\| what" in metadata(result, "raw_dataset")["rejected_rows"]
    assert materialize(project, "base_model,recipe,raw_preferences").success
    alone = materialize(project, "chat_dataset")
    assert "2 of 22 rows cannot be used" in failure(alone)
    assert "at most 1.0% (data.max_invalid)" in failure(alone)
    edit(project, data={"max_invalid": 0.2})
    assert materialize(project, UP_TO_SPLIT).success


def test_lengths_are_shown_with_what_a_limit_costs(project: Path) -> None:
    long = {
        "messages": [
            {"role": "user", "content": "river " * 1400},
            {"role": "assistant", "content": "yes"},
        ]
    }
    write_jsonl(project / "data/train.jsonl", [*conversations(300, lambda _: "yes"), long])
    shown = metadata(materialize(project, UP_TO_SPLIT), "chat_dataset")
    assert shown["conversations_too_long"] == 1
    assert shown["zero_supervised"] == 0
    assert (
        shown["max_length"] == 256
    )  # the tiny model's context is shorter than the default of 1024
    assert "data:image/png;base64," in shown["lengths"]
    assert "| 512 | 1 |" in shown["lengths"]
    assert "| 1024 | 1 |" in shown["lengths"]
    assert "| 2048 | 0 | 100.0 % |" in shown["lengths"]
