"""The demo's data and model as they ship: what data/README.md says of them is counted here."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ft_assets.config import load_project
from ft_assets_tests.factories import prompt_ids, supervised

ROOT = Path(__file__).parents[1]
LABELS = {
    "category": {"delivery", "refund", "defect", "billing", "account", "question"},
    "product": {"headphones", "kettle", "lamp", "router", "vacuum", "watch", None},
    "urgency": {"high", "normal", "low"},
    "language": {"en", "de", "fr", "es"},
}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "data" / name).read_text().splitlines()]


def check_label(message: str, answer: str) -> None:
    label = json.loads(answer)
    assert list(label) == [*LABELS, "order"], message
    for key, values in LABELS.items():
        assert label[key] in values, (message, key)
    order = label["order"]
    if order is not None:
        digits = "".join(character for character in message if character.isdigit())
        assert order.startswith("FW-") and len(order) == 8 and order[3:] in digits, (message, order)


def test_every_conversation_has_a_label_of_the_declared_sets() -> None:
    conversations = rows("conversations.jsonl")
    assert len(conversations) >= 500
    for row in conversations:
        check_label(row["messages"][-2]["content"], row["messages"][-1]["content"])
    assert len({row["messages"][-2]["content"].casefold() for row in conversations}) == len(
        conversations
    )
    for key, values in LABELS.items():  # no label is missing, none is nearly all
        given = [json.loads(row["messages"][-1]["content"])[key] for row in conversations]
        assert set(given) == values
        assert max(given.count(value) for value in values) < 0.85 * len(given)


def test_every_rejected_answer_is_wrong_and_every_chosen_one_is_right() -> None:
    pairs = rows("preferences.jsonl")
    assert len(pairs) >= 150
    for pair in pairs:
        message = (
            pair["prompt"][-1]["content"] if isinstance(pair["prompt"], list) else pair["prompt"]
        )
        chosen, rejected = (
            value if isinstance(value, str) else value[-1]["content"]
            for value in (pair["chosen"], pair["rejected"])
        )
        check_label(message, chosen)
        with contextlib.suppress(json.JSONDecodeError):  # prose around the object is the mistake
            assert json.loads(rejected) != json.loads(chosen), message


def test_files_share_no_message() -> None:
    seen: dict[str, str] = {}
    for name in ("conversations.jsonl", "few_shot.jsonl", "general.jsonl", "retention.jsonl"):
        for row in rows(name):
            text = next(
                turn["content"] for turn in row["messages"] if turn["role"] == "user"
            ).casefold()
            assert seen.setdefault(text, name) == name, text
    assert len(rows("retention.jsonl")) >= 60
    assert len(rows("few_shot.jsonl")) == 5


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model: real weights, dequantized from the GGUF file of its package."""
    from ft_assets.models.snapshot import write_snapshot
    from ft_assets.models.source import source_identity

    project = load_project(ROOT / "finetune.yaml")
    name = next(iter(project.base_models))
    settings = project.base_model(name)
    output = tmp_path_factory.mktemp("smollm2")
    write_snapshot(name, settings, ROOT, source_identity(name, settings, ROOT), None, output)
    return output


@pytest.mark.slow
def test_real_base_speaks_and_stops_by_itself(snapshot: Path) -> None:
    from ft_assets.inference.generation import generate
    from ft_assets.models.loading import load_base, load_tokenizer, stop_ids

    tokenizer = load_tokenizer(snapshot)
    question = "What is the capital of France?"
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": question}])
    answer = generate(load_base(snapshot), tokenizer, [prompt], stop_ids(snapshot), 40, 1)[0]
    assert "Paris" in answer.text
    assert answer.stopped


def test_loss_on_supervised_positions_equals_that_on_all(snapshot: Path) -> None:
    import torch

    from ft_assets.config import LoraSettings
    from ft_assets.models.loading import load_tokenizer, stop_ids
    from ft_assets.training.adapter import new_adapter
    from ft_assets.training.cpu_loss import supervised_loss

    tokenizer, model = load_tokenizer(snapshot), new_adapter(snapshot, LoraSettings()).float()
    messages = rows("conversations.jsonl")[0]["messages"]
    row = supervised(tokenizer, messages, stop_ids(snapshot))
    ids = torch.tensor([row.input_ids])
    labels = torch.where(torch.tensor([row.supervised]), ids, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad():
        assert torch.isclose(supervised_loss(model, inputs, None), model(**inputs).loss, rtol=1e-4)


def test_code_location_loads_without_torch() -> None:
    import subprocess
    import sys

    heavy = {"torch", "transformers", "trl", "peft", "datasets", "scipy"}
    code = (
        "import sys, ft_assets.definitions as it; it.defs(); "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert done.stdout.strip() == "[]"
