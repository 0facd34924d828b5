"""Reinforcement learning: the reference, the rewards, the order of prompts, and the resume."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import RlSettings, load_project
from ft_assets.errors import ConfigError, TrainingError
from ft_assets.inference.generation import Answer
from ft_assets.training import rl as rl_module
from ft_assets.training import rl_trainer
from ft_assets.training.prompt_order import PromptOrder
from ft_assets.training.rl_trainer import Given, Prompt, Reward, Rollout
from ft_assets_tests.factories import edit
from ft_assets_tests.kill_points import run
from ft_assets_tests.pipeline import checks, failure, materialize
from ft_assets_tests.training import rl, same, sft, weights


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    sft(tiny_model, folder, num_train_epochs=1, learning_rate=0.02)
    return folder / "output"


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rl")
    return folder, rl(tiny_model, adapter, folder)


def test_policy_starts_at_the_sft_policy_and_leaves_it(
    adapter: Path, undisturbed: tuple[Path, dict[str, Any]]
) -> None:
    folder, metrics = undisturbed
    curve = json.loads((folder / "output/info/curve.json").read_text())
    validation = json.loads((folder / "output/info/validation.json").read_text())
    assert metrics["reference_difference"] == metrics["kl_first"] == 0
    assert metrics["kl_last"] > 0
    assert metrics["steps"] == len(curve) == 6  # 7 prompts, 2 a step, 2 epochs
    assert {"reward", "kl", "entropy", "answer_tokens"} <= curve[0].keys()
    assert [entry["step"] for entry in validation] == [0, 3, 6]
    assert all(entry["validation_reward"] == -entry["validation_loss"] for entry in validation)
    before, after = weights(adapter), weights(folder / "output")
    assert before.keys() == after.keys(), "the reference is not published"
    assert any(bool((before[name] != after[name]).any()) for name in before)


def test_rloo_samples_as_grpo_does(
    tiny_model: Path, adapter: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    metrics = rl(tiny_model, adapter, tmp_path, method="rloo", max_steps=2)
    assert metrics["reward_first"] == undisturbed[1]["reward_first"]
    assert metrics["kl_first"] == 0
    assert not same(tmp_path / "output", adapter)


@pytest.mark.slow
def test_rl_that_is_killed_ends_the_same(
    tiny_model: Path, adapter: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """bench/kill_matrix.py has all kill points."""
    work = {"kind": "rl", "base": str(tiny_model), "adapter": str(adapter)}
    (tmp_path / "work.json").write_text(json.dumps(work))
    assert run("rewards of a step", 4, tmp_path) == -9
    assert run("none", 0, tmp_path) == 0
    (made,) = (tmp_path / "store/rl/tiny").glob("v*")
    assert same(made, undisturbed[0] / "output")
    rewards = [
        [step["reward"] for step in json.loads((folder / "info/curve.json").read_text())]
        for folder in (made, undisturbed[0] / "output")
    ]
    assert rewards[0] == rewards[1]


def test_out_of_memory_keeps_the_reference(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL copies the policy as the reference when a trainer is made: here, after two steps."""
    real, calls = rl_trainer.GRPOTrainer.compute_loss, []

    def small(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(inputs["prompt_ids"]))
        if len(calls) == 6:
            raise torch.OutOfMemoryError("no")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(rl_trainer.GRPOTrainer, "compute_loss", small)
    metrics = rl(tiny_model, adapter, tmp_path, max_steps=4, save_steps=1)
    assert (metrics["out_of_memory"], metrics["micro_batch"]) == (1, 2)
    curve = json.loads((tmp_path / "output/info/curve.json").read_text())
    assert curve[0]["kl"] == 0
    assert all(entry["kl"] > 0 for entry in curve[2:])


def test_reference_that_is_not_the_sft_policy_is_refused(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout of the reference alone, which TRL leaves on, is seen too."""
    monkeypatch.setattr(rl_trainer, "turn_off_dropout", lambda model: None)
    with pytest.raises(TrainingError, match="policy and reference differ"):
        rl(tiny_model, adapter, tmp_path)


@pytest.mark.parametrize(("weight", "scores"), [(1.0, [0, 2, 1, 1]), (-0.5, [5, 2, 1, 3])])
def test_answer_that_does_not_stop_is_never_the_better_one(
    weight: float, scores: list[float]
) -> None:
    answers = [
        Given("a", "aaaa", False),
        Given("a", "aa", True),
        Given("a", "a", True),
        Given("b", "bb", False),
    ]
    assert long(weight).of_groups(answers) == scores


def long(weight: float) -> Reward:
    return Reward("long", weight, lambda answers: [len(answer.text) for answer in answers])


def test_validation_rewards_as_training_does_and_tells_why_sampling_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def generate(*_: Any, told: Callable[[str], object], **__: Any) -> list[Answer]:
        told("slow")
        return [Answer("aaaa", False, 4, (1, 1, 1, 1)), Answer("aa", True, 2, (1, 1, 0))]

    monkeypatch.setattr(rl_trainer, "generate", generate)
    told: list[str] = []
    rollout = Rollout(None, frozenset({0}), 4, 1.0, 0, told=told.append)
    prompts = [Prompt("a", [1], [1]), Prompt("b", [1], [1])]
    measure = rl_module._Measure(rollout, prompts, [long(0.5)], [])
    measure.trainer = SimpleNamespace(
        model=torch.nn.Identity(), accelerator=SimpleNamespace(autocast=contextlib.nullcontext)
    )
    found = measure(None)
    assert found["validation_reward"] == -found["validation_loss"] == 0.5 * (3 + 2) / 2
    assert found["validation_long"] == 3
    assert told == ["slow"]


def test_order_of_prompts_is_that_of_the_epoch() -> None:
    order = PromptOrder(7, prompts=2, n=3, parts=2, seed=1)
    first = list(order)
    assert len(first) == len(order) == 3 * 2 * 3 * 2
    assert first[:6] == first[6:12], "TRL reads a step for each of its parts"
    assert first[:3] == [first[0]] * 3 and len(set(first)) == 6
    order.set_epoch(1)
    assert list(order) != first
    resumed = PromptOrder(7, prompts=2, n=3, parts=2, seed=1)
    resumed.set_epoch(1)
    assert list(resumed) == list(order)


def test_too_few_prompts_for_a_step_are_refused(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="there are 1 prompts") as refused:
        rl(tiny_model, adapter, tmp_path, rows=1)
    assert "rl.effective_batch: 4" in str(refused.value)
    with pytest.raises(ConfigError, match="add rows of the task to data"):
        rl_module._require_steps([], RlSettings())


@pytest.mark.parametrize(
    ("sections", "found"),
    [
        ({"rl": {"effective_batch": 30}}, "not a multiple of n 8"),
        ({"rl": {"rewards": {"exact": 0}}}, "weight of 0"),
        ({"rl": {"rewards": {"loss": 1}}}, "loss, which does not score an answer alone"),
        ({"rl": {"rewards": {"exct": 1}}}, "exct, which is not measured"),
        ({"rl": {}, "evaluation": {"metric": "loss"}}, "loss, which does not score"),
        ({"rl": {}, "lora": {"method": "full"}}, "second copy of all weights"),
    ],
)
def test_settings_that_cannot_be_rewarded_are_refused(
    project: Path, sections: dict[str, Any], found: str
) -> None:
    edit(project, **sections)
    with pytest.raises(ConfigError, match=found):
        load_project(project / "finetune.yaml")


UP_TO_REPORT = (
    "raw_dataset,base_model,recipe,chat_dataset,heldout_split,lora_adapter,raw_preferences,"
    "dpo_adapter,rl_adapter,answers,eval_report,merged_model"
)


def test_hacked_reward_fails_by_its_name_and_sft_is_merged(healthy: Callable[..., Path]) -> None:
    """The reward is the length of an answer: the longest word is always answered."""
    folder = healthy(
        sft={"num_train_epochs": 4},
        evaluation={"metric": "exact", "python": "hack:long", "max_new_tokens": 8},
        rl={
            "rewards": {"long": 1},
            "n": 8,
            "effective_batch": 32,
            "micro_batch": 32,
            "max_steps": 30,
            "learning_rate": 0.01,
            "temperature": 1.5,
            "beta": 0.0001,
        },
    )
    (folder / "hack.py").write_text(
        "def long(answer, reference, messages):\n    return len(answer) / 10\n"
    )
    made = materialize(folder, UP_TO_REPORT)
    assert made.success, failure(made)
    store, found = ArtifactStore(folder / ".ft/store"), checks(made)
    assert found["rl_starts_at_the_sft_policy"].passed
    assert not found["reward_is_not_hacked"].passed
    report = store.need("eval_report", "tiny").path
    verdict = json.loads((report / "verdict.json").read_text())
    judged = verdict["candidates"]["rl"]
    assert judged["status"] == "FAIL"
    assert any(reason.startswith("the reward was hacked: long") for reason in judged["reasons"])
    assert (verdict["status"], verdict["candidate"]) == ("PASS", "sft")
    assert store.need("merged_model", "tiny").metrics["candidate"] == "sft"
