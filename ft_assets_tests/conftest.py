"""Fixtures: a tiny random Llama with a real tokenizer and a real template, and projects around it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SETTINGS: dict[str, Any] = {
    "data": {
        "train": ["data/train.jsonl"],
        "preferences": ["data/pairs.jsonl"],
        "retention": ["data/retention.jsonl"],
        "few_shot": ["data/few_shot.jsonl"],
        "heldout_share": 0.25,
    },
    "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "sft": {"num_train_epochs": 4, "learning_rate": 0.02, "effective_batch": 8, "micro_batch": 8},
    "dpo": {"learning_rate": 1e-5, "effective_batch": 8, "micro_batch": 8},
    "evaluation": {"max_new_tokens": 8},
    "gate": {"max_retention_loss": 1000.0, "min_heldout_rows": 10, "min_top1_agreement": 0.95},
}
WORDS = [
    "red",
    "green",
    "blue",
    "apple",
    "stone",
    "river",
    "cloud",
    "lamp",
    "paper",
    "window",
    "chair",
    "train",
    "garden",
    "music",
    "winter",
    "summer",
    "coffee",
    "bread",
]


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a case by its argument where the value is bytes: a compressed file has the time in it, and workers must agree on names."""
    return argname if isinstance(val, bytes) else None


def tiny_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer with ChatML markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system what is the colour of yes no"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama, its tokenizer and template: made in a second."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return folder


def make_tiny_model(folder: Path) -> None:
    """Write the tiny model to a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def conversations(count: int, answer: Callable[[int], str], start: int = 0) -> list[dict[str, Any]]:
    """Return distinct one-turn conversations."""
    rows = []
    for index in range(start, start + count):
        word, other = WORDS[index % len(WORDS)], WORDS[(index // len(WORDS)) % len(WORDS)]
        prompt = f"what is the {word} {other} {index}"
        rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer(index)}]})
    return rows


def next_word(index: int) -> str:
    """Return the answer that the taught model can learn to give: the word after the question's first word."""
    return WORDS[(index + 1) % len(WORDS)]


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture(scope="session")
def make_project(tiny_model: Path) -> Callable[[Path], Path]:
    """Return a function that writes, into a folder, a project that a tiny model can learn: every question is answered `yes`."""

    def make(folder: Path) -> Path:
        write_jsonl(folder / "data/train.jsonl", conversations(120, lambda _: "yes"))
        pairs = [
            {"prompt": row["messages"][0]["content"], "chosen": "yes", "rejected": "no no"}
            for row in conversations(16, lambda _: "", start=1000)
        ]
        write_jsonl(folder / "data/pairs.jsonl", pairs)
        write_jsonl(folder / "data/retention.jsonl", conversations(6, lambda index: WORDS[index % len(WORDS)], start=2000))
        write_jsonl(folder / "data/few_shot.jsonl", conversations(2, lambda _: "yes", start=3000))
        (folder / "finetune.yaml").write_text(yaml.safe_dump({"base_models": {"tiny": {"folder": str(tiny_model)}}, **SETTINGS}))
        return folder

    return make


@pytest.fixture
def project(tmp_path: Path, make_project: Callable[[Path], Path]) -> Path:
    """A fresh project; returns its folder."""
    return make_project(tmp_path / "project")


def edit(folder: Path, **sections: Any) -> None:
    """Change keys of a project's finetune.yaml: those of a section that are given, or one at the top level."""
    path = folder / "finetune.yaml"
    settings = yaml.safe_load(path.read_text())
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(settings))


def ft(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `ft` as a user does, in a project's folder."""
    environment = {key: value for key, value in os.environ.items() if key not in ("FT_CONFIG", "DAGSTER_HOME")}
    return subprocess.run(
        [sys.executable, "-m", "ft_assets.cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )


@pytest.fixture(autouse=True)
def process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is run in this process tells its child processes its project by the environment: not the next test's."""
    for name in ("FT_CONFIG", "DAGSTER_HOME"):
        monkeypatch.setenv(name, "")  # else there is nothing that would be put back
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Path]) -> Path:
    """A project whose graph ran once to the end. Shared: a test that changes data, settings or the store works on a copy."""
    folder = make_project(tmp_path_factory.mktemp("finished"))
    done = ft(folder, "run")
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, to be changed."""
    target = tmp_path / "copy"
    shutil.copytree(finished, target)
    return target


@pytest.fixture(scope="session")
def taught_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after some seconds of training: it knows general prompts and its template's end of turn."""
    from ft_assets_tests.pipeline import teach

    target = tmp_path_factory.mktemp("models") / "taught"
    teach(tiny_model, target)
    return target


@pytest.fixture
def healthy(taught_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a project that passes; keyword arguments change sections of its settings."""

    def make(**changes: dict) -> Path:
        from ft_assets_tests.pipeline import general

        folder = tmp_path / "project"
        write_jsonl(folder / "data/train.jsonl", conversations(240, next_word))
        write_jsonl(folder / "data/general.jsonl", general(100, start=5000))
        write_jsonl(folder / "data/retention.jsonl", general(40, start=9000))
        settings = {
            **SETTINGS,
            "base_models": {"tiny": {"folder": str(taught_model)}},
            "data": {
                "train": ["data/train.jsonl"],
                "rehearsal": ["data/general.jsonl"],
                "retention": ["data/retention.jsonl"],
                "heldout_share": 0.25,
                "validation_share": 0.15,
            },
            "sft": {"num_train_epochs": 6, "learning_rate": 0.01, "effective_batch": 8, "micro_batch": 8},
            "gate": {"min_heldout_rows": 10, "max_retention_loss": 0.5, "max_retention_drop": 0.5},
        }
        for section, values in changes.items():
            settings[section] = {**settings.get(section, {}), **values}
        (folder / "finetune.yaml").write_text(yaml.safe_dump(settings))
        return folder

    return make
