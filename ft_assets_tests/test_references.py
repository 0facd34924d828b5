"""Test the references of answers that are tool calls, through the whole graph.

Such a reference is the call in the text form of the chat template.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from ft_assets.evaluation.references import with_references
from ft_assets_tests.factories import WORDS, edit, tiny_tokenizer, write_jsonl
from ft_assets_tests.pipeline import UP_TO_REPORT, artifact, failure, materialize
from ft_assets_tests.test_templates import AS_OBJECT, CALL, TOOL


def test_reference_is_the_content_or_the_call_as_it_is_written() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("yes no", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = {
        "input_ids": [*ids, *ids, end, 1],
        "supervised": [False] * len(ids) + [True] * (len(ids) + 1) + [False],
    }
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "stone"}]
    called = [said[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    references = with_references(
        tokenizer, [{**row, "messages": said}, {**row, "messages": called}]
    )
    assert [one["reference"] for one in references] == ["stone", "yes no"]


def test_tool_calls_go_through_training_and_evaluation(project: Path, tiny_model: Path) -> None:
    roomy = project / "roomy"  # the tools' text alone is longer than the tiny model's context
    shutil.copytree(tiny_model, roomy)
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    (project / "tools.jinja").write_text(AS_OBJECT)
    rows = []
    for number in range(60):
        call = {
            "type": "function",
            "function": {
                "name": "colour_of",
                "arguments": {"thing": WORDS[number % len(WORDS)], "deep": True},
            },
        }
        asked = {"role": "user", "content": f"colour of {WORDS[number % len(WORDS)]} {number}"}
        rows.append(
            {
                "messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}],
                "tools": [TOOL],
            }
        )
    write_jsonl(project / "data/train.jsonl", rows)
    for name in ("few_shot", "retention"):
        (project / f"data/{name}.jsonl").unlink()
    edit(
        project,
        base_models={"tiny": {"folder": str(roomy)}},
        chat={"chat_template": "tools.jinja"},
        sft={"num_train_epochs": 1},
        evaluation={"max_new_tokens": 128, "tool_calls": "ordered", "metric": "tool_calls"},
        data={"few_shot": [], "retention": [], "preferences": []},
    )
    result = materialize(project, UP_TO_REPORT)
    # One epoch is too short for a PASS.
    assert not (said := failure(result)) or "better_than_base" in said, said
    judged = pq.read_table(artifact(project, "eval_report") / "rows.parquet").to_pylist()
    assert judged
    assert all(
        '"colour_of"' in row["reference"] and '"thing"' in row["reference"] for row in judged
    )
