"""Each held-out reference is scored against itself before any training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ft_assets.chat.rendering import Renderer
from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.data.tables import REJECTED, TOKENIZED, TableWriter, read_table
from ft_assets.evaluation.reachable import Target, read_targets, unreachable
from ft_assets.steps.chat import RowRenderer
from ft_assets_tests.factories import edit, tiny_tokenizer, write_jsonl
from ft_assets_tests.pipeline import checks, materialize
from ft_assets_tests.test_split import talk

UP_TO_SFT = "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split,lora_adapter"


def found(
    references: Sequence[str | tuple[str, str]],
    schema: Any = None,
    gate: GateSettings | None = None,
    tokens: int = 5,
    options: tuple[str, ...] = (),
    **settings: Any,
) -> list[str]:
    """Return the messages about references, each a text or (text, decoded text)."""
    pairs = [(one, one) if isinstance(one, str) else one for one in references]
    targets = [Target(str(index), *pair, tokens, options) for index, pair in enumerate(pairs)]
    errors = unreachable(
        targets,
        EvaluationSettings(**settings),
        gate or GateSettings(),
        schema,
        where=lambda ids: {one: f"heldout.jsonl:{int(one) + 1}" for one in ids},
    )
    return [str(error) for error in errors]


def test_references_that_can_be_reached_are_fine() -> None:
    assert found(["yes", "no"], labels=["Yes", "No"], metric="label", metrics=["rouge"]) == []
    assert found(['{"a": 1}'], json_fields=["a"], json_schema="file", schema={}) == []


@pytest.mark.parametrize(
    "reference", ['{"a": 1, "b": 2}', "{}", "[1]", "no JSON", '{"a": NaN}', '{"a": 1, "a": 2}']
)
def test_json_reference_with_other_keys_names_its_line_once(reference: str) -> None:
    (message,) = found(['{"a": 1}', reference], json_fields=["a"])
    assert message.startswith(f"heldout.jsonl:2: the reference is {reference[:80]!r}")
    assert "a JSON object with the keys a" in message
    assert "correct the row, or evaluation.json_fields" in message


def test_reference_that_is_no_label_breaks_the_schema_or_the_pattern() -> None:
    (message,) = found(["yes", "maybe"], labels=["yes", "no"], metric="label")
    assert message.startswith("heldout.jsonl:2: the reference is 'maybe'")
    (message,) = found(["1", "x"], schema={"type": "integer"}, json_schema="file", metric="schema")
    assert "heldout.jsonl:2: the reference 'x' itself has schema 0: it is not strict" in message
    schema = {"type": "object", "properties": {"count": {"maximum": 9}}}
    (message,) = found(['{"count": 10}'], schema=schema, json_schema="file", metric="schema")
    assert "at $.count, 10 is greater than the maximum of 9" in message
    for elsewhere in ("#/$defs/none", "other.json", "http://127.0.0.1:9/x.json"):
        schema = {"properties": {"a": {"$ref": elsewhere}}}
        (message,) = found(['{"a": 1}'], schema=schema, json_schema="file", metric="schema")
        assert "json_schema has a $ref that cannot be resolved" in message
    (message,) = found(["ab", "b"], regex="a.*")
    assert "heldout.jsonl:2: the reference 'b' itself has regex 0" in message
    assert "correct the row, or evaluation.regex" in message


def test_reference_that_decoding_changes_is_found() -> None:
    (message,) = found(["fine", ("he said : no", "he said: no")])
    assert message.startswith("heldout.jsonl:2: the reference 'he said : no' itself has exact 0")
    assert "its tokens decode to 'he said: no'" in message
    # `exact` is always measured, but here the verdict is about another metric.
    assert found([("a b", "a  b")], metric="rougeL", metrics=["rouge"]) == []


def test_graded_metric_blocks_only_where_the_verdict_needs_it() -> None:
    settings = {"metric": "rougeL", "metrics": ["rouge"]}
    assert found(["Paris"], **settings) == []  # rouge2 of one word is 0, and decides nothing
    goals = GateSettings(metrics={"rouge2": 0.05})
    (message,) = found(["Paris"], gate=goals, **settings)
    assert "'Paris' itself has rouge2 0" in message


def test_reference_longer_than_an_answer_can_be_is_an_error_with_the_value_to_set() -> None:
    anyhow = GateSettings(min_stop_rate=0)
    assert found(["yes"], gate=anyhow, tokens=5, max_new_tokens=4) == [], "the text alone fits"
    assert found(["yes"] * 9, tokens=6, max_new_tokens=4)[0].splitlines() == [
        "heldout.jsonl:1: the reference has 5 tokens (9 rows in all; also heldout.jsonl:2, "
        "heldout.jsonl:3, heldout.jsonl:4, heldout.jsonl:5, heldout.jsonl:6, …)",
        "  expected: at most evaluation.max_new_tokens, 4: exact of a truncated answer is 0",
        "  to do:    set evaluation.max_new_tokens to 6, the longest with its end of turn",
    ]


def test_long_references_of_a_graded_metric_count_for_the_stop_rate() -> None:
    settings = {"metric": "chrf", "metrics": ["chrf"], "max_new_tokens": 4, "tokens": 6}
    (message,) = found(["yes"] * 10, **settings)
    assert "10 of 10 references do not end within evaluation.max_new_tokens, 4" in message
    assert "gate.min_stop_rate, 0.9" in message
    assert found(["yes"] * 10, gate=GateSettings(min_stop_rate=0), **settings) == []


def test_reference_without_a_text_is_an_error() -> None:
    (message,) = found(["yes", ("", "")])
    assert message.startswith("heldout.jsonl:2: the reference is empty")
    (message,) = found(["yes", ("no", "")])
    assert "heldout.jsonl:2: the reference 'no' itself has exact 0, because its tokens" in message


def test_reference_is_of_its_declared_kind() -> None:
    (message,) = found(["12", "a dozen"], metrics=["number"], metric="number")
    assert message.startswith("heldout.jsonl:2: the reference cannot be compared: it is 'a dozen'")
    (message,) = found(["03/04/2026"], metrics=["date"], metric="date")
    assert "which is 2026-03-04 or 2026-04-03: evaluation.day_first is not set" in message
    assert found(["03/04/2026"], metrics=["date"], metric="date", day_first=True) == []
    (message,) = found(['{"a": "x"}'], json_fields=["a"], normalise={"a": "number"})
    assert "its field a is 'x', which is no number" in message
    (message,) = found(["x"], metrics=["json_f1"])
    assert "JSON: json_f1 is in evaluation.metrics" in message


def test_reference_is_one_of_the_options_of_its_row() -> None:
    chosen = {"choice": "options", "metric": "choice"}
    assert found(["Paris", "rome."], options=("Rome", "Paris"), **chosen) == []
    assert found(["A"], options=("a", "A"), **chosen) == [], "options that differ by case alone"
    for options in ((), ("Paris",), ("Rome", "Paris", "paris"), ("Rome", "Bonn")):
        (message,) = found(["paris."], options=options, **chosen)
        assert "the reference is 'paris.' and the options are" in message
        assert message.startswith("heldout.jsonl:1: ")


def test_chat_dataset_stores_what_the_tokens_decode_to(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    # A tokenizer that drops the blank before "." when it decodes.
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    stops = frozenset([tokenizer.eos_token_id])
    write = tmp_path / "in.parquet"
    answers = {"one?": "fine", "two?": "so . no"}
    rows = [talk(question, answer) for question, answer in answers.items()]
    rows[0]["options"] = ["fine", "bad"]
    with TableWriter(write, TOKENIZED) as table:
        for row in rows:
            table.write(row)
    with (
        TableWriter(tmp_path / "refused.parquet", REJECTED) as refused,
        TableWriter(tmp_path / "out.parquet", TOKENIZED) as out,
    ):
        renderer = RowRenderer(Renderer(tokenizer, stops), 100, refused)
        renderer.conversations("heldout", write, out)
    assert renderer.first is None
    stored = {row["messages"][0]["content"]: row for row in read_table(tmp_path / "out.parquet")}
    assert "expected" not in stored["one?"] and "decoded" not in stored["one?"]
    assert stored["one?"]["options"] == ["fine", "bad"] and "options" not in stored["two?"]
    assert stored["two?"]["decoded"] == "so. no"
    targets = {one.reference: one.decoded for one in read_targets(tmp_path / "out.parquet")}
    assert targets == {"fine": "fine", "so . no": "so. no"}


@pytest.mark.graph
def test_unreachable_reference_blocks_training_and_names_file_and_line(project: Path) -> None:
    rows = [
        {"prompt": f"count {number}?", "completion": json.dumps({"item": "lamp", "count": number})}
        for number in range(8)
    ]
    rows[4]["completion"] = json.dumps({"item": "lamp", "count": 4, "note": "gift"})
    write_jsonl(project / "data/exam.jsonl", rows)
    edit(
        project,
        data={"heldout": ["data/exam.jsonl"]},
        evaluation={"json_fields": ["item", "count"], "max_new_tokens": 64},
    )
    result = materialize(project, UP_TO_SFT)
    assert not result.success
    said = checks(result)["references_can_be_reached"].description or ""
    assert "exam.jsonl:5: the reference is" in said, said
    assert "a JSON object with the keys item, count" in said
    started = {event.step_key for event in result.all_events if event.is_step_start}
    assert not any("lora_adapter" in str(key) for key in started)
