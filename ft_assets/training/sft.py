"""Supervised fine-tuning with TRL on rows that are already tokenized, masked and proven.

The trainer gets `input_ids` and `labels`, so that it neither renders nor tokenizes anything again: what was proven is
what is trained on. Labels are -100 outside the assistant's answers and their end of turn.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ft_assets.config import LoraSettings, SftSettings
from ft_assets.errors import TrainingError
from ft_assets.job import Report
from ft_assets.models.loading import load_tokenizer
from ft_assets.training.adapter import is_finite, largest_update, new_adapter, save_adapter, trainable_share
from ft_assets.training.callbacks import Progress, Validation, device_memory_gb
from ft_assets.training.cpu_loss import CpuSFTTrainer
from ft_assets.training.options import trainer_options


def labels(row: dict[str, Any]) -> list[int]:
    """Return the labels of a tokenized row: its ids where supervised, -100 elsewhere."""
    return [token if flag else -100 for token, flag in zip(row["input_ids"], row["supervised"], strict=True)]


def train_sft(
    snapshot: Path,
    rows: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    lora: LoraSettings,
    sft: SftSettings,
    checkpoints: Path,
    output: Path,
    report: Report,
) -> dict[str, Any]:
    """Train and save the adapter to `output`; resume from `checkpoints` if one is there.

    Returns metrics: loss of the first and last steps, tokens/s over all trained tokens, peak memory in GB, trainable
    parameters. Raises TrainingError if nothing was learnt or the loss is not finite.
    """
    set_seed(sft.seed)
    tokenizer = load_tokenizer(snapshot)
    options = trainer_options(sft, "sft", checkpoints, SFTConfig)
    model = new_adapter(snapshot, lora)
    share = trainable_share(model)
    dataset = Dataset.from_list([{"input_ids": row["input_ids"], "labels": labels(row)} for row in rows])
    tokens = sum(len(row["input_ids"]) for row in rows)
    progress = Progress(report, tokens / len(rows) * sft.effective_batch)
    # bitsandbytes repacks NF4 weights for good in a CPU's first forward pass for inference; LoRA gradients are zero after it.
    watched = [] if lora.method == "qlora" and not torch.cuda.is_available() else validation
    watch = Validation(watched, sft.micro_batch, tokenizer.pad_token_id, report)
    report("loaded", rows=len(rows), tokens=tokens, **share)
    kind = SFTTrainer if torch.cuda.is_available() else CpuSFTTrainer
    trainer = kind(
        model=model,
        args=SFTConfig(**{"max_length": None, "train_sampling_strategy": "random", **options}),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[progress, watch],
    )
    resumed = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    begun = time.perf_counter()
    trainer.train(resume_from_checkpoint=resumed)
    seconds = time.perf_counter() - begun
    if not is_finite(trainer.model):
        raise TrainingError("sft", "the adapter holds values that are not finite", "finite weights", "lower sft.learning_rate")
    return _save(trainer.model, progress, watch, output) | {
        **share,
        "train_rows": len(rows),
        "train_tokens": tokens,
        "supervised_tokens": sum(sum(row["supervised"]) for row in rows),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "tokens_per_s": progress.curve[-1].get("tokens_per_s", 0.0),
        "peak_train_memory_gb": round(device_memory_gb(), 3),
        "resumed_from_step": int(resumed.rsplit("-", 1)[-1]) if resumed else 0,
    }


def _save(model: Any, progress: Progress, watch: Validation, output: Path) -> dict[str, Any]:
    update = largest_update(model)
    if update == 0.0:
        raise TrainingError(
            "sft", "every B of the adapter is still zero", "a trained adapter", "raise sft.learning_rate or the number of steps"
        )
    save_adapter(model, output)
    (output / "info").mkdir(exist_ok=True)
    (output / "info" / "curve.json").write_text(json.dumps(progress.curve))
    (output / "info" / "validation.json").write_text(json.dumps(watch.losses))
    losses = [entry["loss"] for entry in progress.curve]
    window = max(1, len(losses) // 10)
    return {
        "largest_update": update,
        "loss_first": round(sum(losses[:window]) / window, 4),
        "loss_last": round(sum(losses[-window:]) / window, 4),
    }
