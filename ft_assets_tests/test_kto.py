"""KTO of labelled answers is TRL's, with the reference, the proofs and the resume of DPO."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from ft_assets.config import DpoSettings, LoraSettings
from ft_assets.errors import ConfigError, TrainingError
from ft_assets.models import loading
from ft_assets.models.loading import load_tokenizer
from ft_assets.steps.dpo import _used
from ft_assets.training import dpo as module
from ft_assets.training.adapter import trained_adapter
from ft_assets.training.label_trainer import LabelTrainer, labelled, weights
from ft_assets_tests.training import LORA, dpo, make_pairs, same, score_by_the_base, sft


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    sft(tiny_model, folder, num_train_epochs=6, learning_rate=0.02)
    return folder / "output"


def kto(base: Path, adapter: Path, folder: Path, **options: Any) -> dict[str, Any]:
    return dpo(base, adapter, folder, labels=True, **options)


def test_reference_is_proven_and_the_first_loss_is_a_half(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    # The proof also holds for a training with dropout.
    options = {"trainer": {"disable_dropout": False}, "num_train_epochs": 1, "validation": 4}
    metrics = kto(tiny_model, adapter, tmp_path, **options)
    assert metrics["preference_method"] == "kto"
    assert (metrics["pairs"], metrics["labels"], metrics["validation_labels"]) == (0, 20, 8)
    assert metrics["reference_difference"] <= 1e-3
    assert metrics["reference_loss"] == pytest.approx(0.5, abs=0.01)
    assert metrics["loss_first"] == pytest.approx(0.5, abs=0.02)
    assert metrics["steps"] == 3  # 20 answers, 8 a step: an epoch has 3


def test_base_as_the_reference_fails_the_proof(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "score_reference", score_by_the_base)
    with pytest.raises(TrainingError, match="policy and reference differ by"):
        kto(tiny_model, adapter, tmp_path)
    assert not list((tmp_path / "output").iterdir())


def test_rewards_part_and_a_resumed_run_ends_the_same_bit_for_bit(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    options = {"validation": 4, "learning_rate": 0.01}
    kto(tiny_model, adapter, tmp_path / "one", **options)
    curve = json.loads((tmp_path / "one/output/info/curve.json").read_text())
    assert curve[0]["loss"] == pytest.approx(0.5, abs=0.01)
    assert sum(step["loss"] for step in curve[3:]) / 3 < 0.47
    shutil.copytree(tmp_path / "one/checkpoints", tmp_path / "two/checkpoints")
    (tmp_path / "two/checkpoints/checkpoint-6/whole.json").unlink()
    resumed = kto(tiny_model, adapter, tmp_path / "two", **options)
    assert resumed["resumed_from_step"] == 4
    assert same(tmp_path / "one/output", tmp_path / "two/output")


def loss_and_gradient(trainer: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.model.zero_grad()
    loss.backward()
    parts = [
        weight.grad.flatten()
        for name, weight in sorted(trainer.model.named_parameters())
        if weight.requires_grad and weight.grad is not None
    ]
    return loss.item(), torch.cat(parts)


def test_loss_and_gradient_are_those_of_trls_own_reference(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's trainer scores its frozen copy of the adapter in each step; ours is scored before."""
    monkeypatch.setattr(loading, "compute_dtype", lambda: torch.float32)
    rows = labelled(make_pairs(4), 0)
    options: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "max_length": None,
        "remove_unused_columns": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "desirable_weight": 1.5,
    }
    lora = LoraSettings.model_validate({**LORA, "method": "lora"})
    tokenizer = load_tokenizer(tiny_model)

    def moved(trainer: Any) -> Any:
        """Move the policy away from the reference, so that no reward is 0."""
        torch.manual_seed(0)
        for name, weight in sorted(trainer.model.named_parameters()):
            if weight.requires_grad and ".ref." not in name:
                weight.data += 0.05 * torch.randn_like(weight)
        return trainer

    ours = LabelTrainer(
        model=trained_adapter(tiny_model, lora, adapter),
        args=KTOConfig(**options),
        pairs=rows,
        tokenizer=tokenizer,
    )
    scored = module.score_reference(ours, rows, 8)
    batch = ours.data_collator(
        [module.with_reference(row, *both) for row, both in zip(rows, scored.values, strict=True)]
    )
    monkeypatch.setattr(KTOTrainer, "_prepare_dataset", lambda self, dataset, *_: dataset)
    theirs = KTOTrainer(
        model=trained_adapter(tiny_model, lora, adapter),
        args=KTOConfig(**options),
        train_dataset=Dataset.from_list([{**row} for row in rows]),
        processing_class=tokenizer,
    )
    (our_loss, our_gradient), (loss, gradient) = (
        loss_and_gradient(moved(trainer), batch) for trainer in (ours, theirs)
    )
    assert abs(loss - 0.5) > 1e-3
    assert our_loss == pytest.approx(loss, abs=1e-6)
    assert torch.allclose(our_gradient, gradient, atol=1e-6)


def test_each_answer_is_trained_with_its_label_and_an_answer_to_another_prompt() -> None:
    pairs: Any = make_pairs(5)
    pairs[0]["rejected_ids"] = []  # a labelled answer without a partner
    rows = labelled(pairs, 3)
    assert sorted((row["chosen_ids"], row["label"]) for row in rows) == sorted(
        [(pair["chosen_ids"], True) for pair in pairs]
        + [(pair["rejected_ids"], False) for pair in pairs[1:]]
    )
    prompt_of = {tuple(row["chosen_ids"]): row["prompt_ids"] for row in rows}
    assert all(prompt_of[tuple(row["rejected_ids"])] != row["prompt_ids"] for row in rows)
    assert rows == labelled(pairs, 3) != labelled(pairs, 4)


def test_the_rarer_label_weighs_as_much_as_the_other() -> None:
    def of(good: int, bad: int) -> Any:
        return [{"label": True}] * good + [{"label": False}] * bad

    assert weights(of(4, 3)) == weights(of(0, 5)) == {}
    assert weights(of(10, 30)) == {"desirable_weight": 3.0}
    assert weights(of(30, 12)) == {"undesirable_weight": 2.5}


def row(chosen: list[int], rejected: list[int]) -> Any:
    return {"chosen_ids": chosen, "rejected_ids": rejected}


def test_the_method_follows_the_data_unless_it_is_named() -> None:
    both, good, bad = row([1], [2]), row([1], []), row([], [2])
    auto, kto_named, dpo_named = (
        DpoSettings.model_validate({"method": method}) for method in ("auto", "kto", "dpo")
    )
    assert _used([both, good], auto) == ([both], False)
    assert _used([good, bad], auto) == ([good, bad], True)
    assert _used([both, good], kto_named) == ([both, good], True)
    assert _used([good, bad], dpo_named) == ([], False)
    assert _used([], kto_named) == ([], False)
    with pytest.raises(ConfigError, match="no answer with the label false"):
        _used([good], auto)
    with pytest.raises(ConfigError, match="hinge, a loss of pairs"):
        _used([good, bad], DpoSettings.model_validate({"loss_type": "hinge"}))
    with pytest.raises(ValueError, match="method kto has a loss of its own"):
        DpoSettings.model_validate({"method": "kto", "loss_type": "hinge"})
    with pytest.raises(ValueError, match=r"set dpo\.method: kto"):
        DpoSettings.model_validate({"loss_type": "kto"})
    # The settings of an older store, which trained pairs, are those of `auto`.
    assert "method" not in auto.decisive()
    assert kto_named.decisive()["method"] == "kto"
