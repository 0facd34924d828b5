"""Direct Preference Optimization (Rafailov et al. 2023) on top of the SFT adapter, with the SFT policy as reference.

TRL clones the trained adapter `default` into a frozen `ref`; giving it a fresh adapter on the base would make the *base*
the reference. That it is right is proven before the first step: with policy == reference the sigmoid loss is ln 2 and
the reward margins are 0 on every pair.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint, set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ft_assets.config import DpoSettings, LoraSettings
from ft_assets.errors import TrainingError
from ft_assets.job import Report
from ft_assets.models.loading import load_tokenizer
from ft_assets.training.adapter import is_finite, save_adapter, trained_adapter
from ft_assets.training.callbacks import Progress, device_memory_gb
from ft_assets.training.options import trainer_options


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer for rows that already have prompt_ids, chosen_ids and rejected_ids: it tokenizes nothing again."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def prove_reference(trainer: DPOTrainer, batches: int = 2) -> float:
    """Return the largest |reward margin| over the first batches with the untrained policy.

    Compares the policy's and the reference's log-probabilities of the same answers with dropout off; the reference is
    right when they are equal. Raises TrainingError otherwise.
    """
    model: Any = trainer.model
    training = model.training
    model.eval()
    largest = 0.0
    loader = trainer.get_train_dataloader()
    for index, batch in enumerate(loader):
        if index == batches:
            break
        with torch.no_grad():
            ids, mask = batch["input_ids"], batch["attention_mask"]
            policy = _sequence_log_probabilities(model, ids, mask, batch["completion_mask"])
            model.set_adapter("ref")
            reference = _sequence_log_probabilities(model, ids, mask, batch["completion_mask"])
            model.set_adapter("default")
        largest = max(largest, float((policy - reference).abs().max()))
    for name, parameter in model.named_parameters():  # set_adapter turns the gradients of both on
        parameter.requires_grad_(".default." in name)
    model.train(training)
    if largest > 1e-3:
        raise TrainingError(
            "dpo: reference",
            f"policy and reference differ by {largest:.4f} nats before the first step",
            "0 (the SFT policy is the reference)",
            "this is a fault of the set-up, not of your data: report it",
        )
    return largest


def _sequence_log_probabilities(model: Any, ids: Any, mask: Any, completion: Any) -> Any:
    logits = model(input_ids=ids, attention_mask=mask, labels=None).logits[:, :-1].float()
    chosen = torch.gather(logits.log_softmax(-1), 2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    return (chosen * completion[:, 1:]).sum(1)


def train_dpo(
    snapshot: Path,
    sft_adapter: Path,
    pairs: list[dict[str, Any]],
    lora: LoraSettings,
    dpo: DpoSettings,
    checkpoints: Path,
    output: Path,
    report: Report,
) -> dict[str, Any]:
    """Train from the SFT adapter and save one adapter (SFT + DPO) to `output`. Returns metrics; raises TrainingError."""
    set_seed(dpo.seed)
    tokenizer = load_tokenizer(snapshot)
    options = trainer_options(dpo, "dpo", checkpoints, DPOConfig)
    model = trained_adapter(snapshot, lora, sft_adapter)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_list([{**{name: row[name] for name in columns}, "length": _length(row)} for row in pairs])
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    progress = Progress(report, tokens / len(pairs) * dpo.effective_batch)
    trainer = TokenizedDPOTrainer(
        model=model,
        args=DPOConfig(
            **{
                "max_length": None,
                "beta": dpo.beta,
                "loss_type": dpo.loss_type,
                "train_sampling_strategy": "group_by_length",
                "remove_unused_columns": False,
                **options,
            }
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[progress],
    )
    resumed = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    difference = prove_reference(trainer)
    report("reference proven", reference_difference=difference, pairs=len(pairs), tokens=tokens)
    begun = time.perf_counter()
    trainer.train(resume_from_checkpoint=resumed)
    seconds = time.perf_counter() - begun
    if not is_finite(trainer.model):
        raise TrainingError("dpo", "the adapter holds values that are not finite", "finite weights", "lower dpo.learning_rate")
    save_adapter(trainer.model, output)
    (output / "info").mkdir(exist_ok=True)
    (output / "info" / "curve.json").write_text(json.dumps(progress.curve))
    first, last = progress.curve[0], progress.curve[-1]
    if not resumed and dpo.loss_type == "sigmoid" and lora.lora_dropout == 0 and abs(first["loss"] - math.log(2)) > 0.02:
        raise TrainingError(
            "dpo: first step", f"the loss is {first['loss']}", f"ln 2 = {math.log(2):.4f}", "the reference is not the SFT policy: report it"
        )
    return {
        "pairs": len(pairs),
        "train_tokens": tokens,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "tokens_per_s": last.get("tokens_per_s", 0.0),
        "reference_difference": difference,
        "loss_first": first["loss"],
        "loss_last": last["loss"],
        "reward_accuracy": last.get("reward_accuracies", 0.0),
        "reward_margin": last.get("reward_margins", 0.0),
        "peak_train_memory_gb": round(device_memory_gb(), 3),
        "resumed_from_step": int(resumed.rsplit("-", 1)[-1]) if resumed else 0,
    }


def _length(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
