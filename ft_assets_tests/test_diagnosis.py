"""Four pipelines, each broken in one of the common ways, each named rightly; a healthy one names none."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ft_assets_tests.conftest import SETTINGS, WORDS, conversations, write_jsonl
from ft_assets_tests.pipeline import checks, general, materialize, read, teach

FOREIGN = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
ASSETS = "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split,lora_adapter,dpo_adapter,eval_report"


@pytest.fixture(scope="session")
def taught_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after some seconds of training: it knows general prompts and its template's end of turn."""
    target = tmp_path_factory.mktemp("models") / "taught"
    teach(tiny_model, target)
    return target


@pytest.fixture
def healthy(taught_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a project that passes; keyword arguments change sections of its settings."""

    def make(**changes: dict) -> Path:
        folder = tmp_path / "project"
        write_jsonl(folder / "data/train.jsonl", conversations(120, lambda index: ("yes", "no", "paper")[index % 3]))
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


def causes(folder: Path) -> list[str]:
    return [finding["cause"] for finding in read(folder, "eval_report", "diagnosis.json")]


def test_healthy_pipeline_passes_and_names_no_cause(healthy: Callable[..., Path]) -> None:
    folder = healthy()
    result = materialize(folder, ASSETS)
    verdict = read(folder, "eval_report", "verdict.json")
    assert verdict["status"] == "PASS", verdict["reasons"]
    assert causes(folder) == []
    assert all(check.passed for name, check in checks(result).items() if name != "better_than_prompting")


def test_healthy_pipeline_with_too_few_rows_cannot_tell_and_names_no_cause(healthy: Callable[..., Path]) -> None:
    folder = healthy(gate={"min_heldout_rows": 1000})
    materialize(folder, ASSETS)
    assert read(folder, "eval_report", "verdict.json")["status"] == "INCONCLUSIVE"
    assert causes(folder) == []


def test_foreign_template_is_named(healthy: Callable[..., Path]) -> None:
    folder = healthy(chat={"chat_template": "template.jinja"}, sft={"max_steps": 2, "learning_rate": 1e-4})
    (folder / "template.jinja").write_text(FOREIGN)
    materialize(folder, ASSETS)
    assert causes(folder) == ["template mismatch"], read(folder, "eval_report", "verdict.json")


def test_narrow_data_is_named(healthy: Callable[..., Path]) -> None:
    folder = healthy(data={"rehearsal": []})
    result = materialize(folder, ASSETS)
    assert causes(folder) == ["training data too narrow"], read(folder, "eval_report", "verdict.json")
    assert read(folder, "eval_report", "verdict.json")["status"] == "FAIL"
    assert not checks(result)["nothing_forgotten"].passed


def test_overfit_is_named(healthy: Callable[..., Path]) -> None:
    folder = healthy(sft={"num_train_epochs": 25})
    chance = random.Random(0)
    write_jsonl(folder / "data/train.jsonl", conversations(120, lambda _: chance.choice(WORDS)))  # nothing to learn but by heart
    materialize(folder, ASSETS)
    assert causes(folder) == ["overfit"], read(folder, "eval_report", "verdict.json")


def test_wrong_base_is_named(healthy: Callable[..., Path], tiny_model: Path) -> None:
    folder = healthy(base_models={"tiny": {"folder": str(tiny_model)}}, sft={"max_steps": 2, "learning_rate": 1e-4})
    materialize(folder, ASSETS)
    assert causes(folder) == ["wrong base model"], read(folder, "eval_report", "verdict.json")
