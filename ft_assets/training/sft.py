"""Supervised fine-tuning with TRL on rows that are already tokenized, masked and proven.

The trainer gets `input_ids` and `labels`, so that it neither renders nor tokenizes anything again: what was proven is
what is trained on. Labels are -100 outside the assistant's answers and their end of turn.
"""

import functools
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ft_assets.config import LoraSettings, SftSettings
from ft_assets.errors import TrainingError
from ft_assets.job import Report
from ft_assets.models.loading import load_tokenizer
from ft_assets.models.sharding import held_weights
from ft_assets.training.adapter import is_finite, largest_update, new_adapter, trainable_share
from ft_assets.training.callbacks import Progress, device_memory_gb, gpu_share
from ft_assets.training.cpu_loss import CpuSFTTrainer
from ft_assets.training.distributed import world_size
from ft_assets.training.loop import train_to_the_end
from ft_assets.training.memory_plan.model_shape import snapshot_shape
from ft_assets.training.method_choice import plan_once, save_choice
from ft_assets.training.prepare import (
    WholeSteps,
    autocast_is_idle,
    full_precision_adapter,
    make_ready,
    memory_facts,
    plan_padded,
    plan_sft,
    this_machine,
)
from ft_assets.training.trackers import keep_events
from ft_assets.training.trl_options import ToldOptions, told, trainer_options, trl_config
from ft_assets.training.validation import LogsValidation, Validation, answer_loss, save_kept


class ResumingSFTTrainer(LogsValidation, ToldOptions, WholeSteps, SFTTrainer):
    """SFTTrainer whose checkpoints are whole, and so are its steps."""

    key = "sft"


class ResumingCpuSFTTrainer(LogsValidation, ToldOptions, WholeSteps, CpuSFTTrainer):
    """The same with the loss that pays on a CPU."""

    key = "sft"


def labels(row: dict[str, Any]) -> list[int]:
    """Return the labels of a tokenized row: its ids where supervised, -100 elsewhere."""
    return [
        token if flag else -100
        for token, flag in zip(row["input_ids"], row["supervised"], strict=True)
    ]


def train_sft(
    snapshot: Path,
    rows: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    lora: LoraSettings,
    sft: SftSettings,
    checkpoints: Path,
    output: Path,
    report: Report,
    memory_limit_gb: float | None = None,
) -> dict[str, Any]:
    """Train and save the adapter to `output`; resume from `checkpoints` if one is there.

    Returns metrics: loss of the first and last steps, tokens/s over all trained tokens, peak memory in GB, trainable
    parameters, the plan. Raises TrainingError if nothing was learnt or the loss is not finite, MemoryPlanError if it
    cannot fit.
    """
    set_seed(sft.seed)
    tokenizer = load_tokenizer(snapshot)
    asked, machine = sft, this_machine(memory_limit_gb)
    plan = plan_once(
        lora, checkpoints, lambda lora: plan_sft(snapshot, lora, asked, rows, machine), report
    )
    lora, sft = (
        lora.model_copy(update={"method": plan.method}),
        sft.model_copy(update={"micro_batch": plan.micro_batch}),
    )
    trl_config(
        SFTConfig,
        {"max_length": None, **trainer_options(sft, "sft", checkpoints, SFTConfig)},
        "sft",
    )  # before weights load
    model = new_adapter(snapshot, lora, plan.shards)
    share = trainable_share(model)
    padded = functools.partial(plan_padded, plan, snapshot, lora, asked, rows, machine)
    ready = make_ready(model, plan, sft, rows, tokenizer.pad_token_id, report, padded)
    plan = ready.plan
    idle = {"bf16": False} if autocast_is_idle(model, ready) else {}
    dataset = Dataset.from_list(
        [{"input_ids": row["input_ids"], "labels": labels(row)} for row in rows]
    )
    tokens = sum(len(row["input_ids"]) for row in rows)
    share_of_gpu = gpu_share(snapshot_shape(snapshot), lora.method == "full")
    progress = Progress(
        report, tokens / len(rows) * sft.effective_batch, sft.max_loss_rise, share_of_gpu
    )
    # bitsandbytes repacks NF4 weights for good in a CPU's first forward pass for inference; LoRA gradients are zero after it.
    watched = [] if lora.method == "qlora" and not torch.cuda.is_available() else validation
    unwatched = (
        ": bitsandbytes' inference pass on a CPU would spoil the weights for training"
        if validation and not watched
        else ""
    )
    watch = Validation(
        answer_loss(watched, plan, tokenizer.pad_token_id),
        sft,
        "sft",
        checkpoints,
        report,
        unwatched,
    )
    report("loaded", rows=len(rows), tokens=tokens, **share)
    alone_on_cpu = (
        not torch.cuda.is_available() and world_size() == 1
    )  # the loss for a CPU goes round DDP
    kind = ResumingCpuSFTTrainer if alone_on_cpu else ResumingSFTTrainer

    def build(micro_batch: int, callbacks: list[TrainerCallback]) -> SFTTrainer:
        settings = sft.model_copy(update={"micro_batch": micro_batch})
        options = {
            "max_length": None,
            **trainer_options(settings, "sft", checkpoints, SFTConfig),
            **idle,
        }
        with told("sft"):
            trainer = kind(
                model=model,
                args=SFTConfig(**options),
                train_dataset=dataset,
                data_collator=ready.collator,
                processing_class=tokenizer,
                callbacks=[progress, watch, *callbacks],
            )
        trainer.packed = plan.packed
        full_precision_adapter(model)
        return trainer

    begun = time.perf_counter()
    run = train_to_the_end(build, plan.micro_batch, sft.effective_batch, checkpoints, report, "sft")
    seconds = time.perf_counter() - begun
    trainer = run.trainer
    progress.restore(trainer.state)
    watch.restore(trainer.state)
    if not is_finite(trainer.model):
        raise TrainingError(
            where="sft",
            found="the adapter holds values that are not finite",
            expected="finite weights",
            fix="lower sft.learning_rate",
        )
    saved = _save(trainer.model, snapshot, progress, watch, checkpoints, output)
    save_choice(plan, output)
    return saved | {
        **share,
        "train_rows": len(rows),
        "train_tokens": tokens,
        "supervised_tokens": sum(sum(row["supervised"]) for row in rows),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        **progress.speed(),
        "peak_train_memory_gb": round(device_memory_gb(), 3),
        **ready.facts,
        **memory_facts(plan),
        **held_weights(trainer.model),
        **run.facts(),
    }


def _save(
    model: Any,
    snapshot: Path,
    progress: Progress,
    watch: Validation,
    checkpoints: Path,
    output: Path,
) -> dict[str, Any]:
    save_kept(model, watch, progress.curve, output)
    update = largest_update(output, snapshot)
    if update == 0.0:
        raise TrainingError(
            where="sft",
            found="every B of the adapter is still zero",
            expected="a trained adapter",
            fix="raise sft.learning_rate or the number of steps",
        )
    keep_events(checkpoints, output)
    losses = [entry["loss"] for entry in progress.curve]
    window = max(1, len(losses) // 10)
    return {
        "largest_update": update,
        "loss_first": round(sum(losses[:window]) / window, 4),
        "loss_last": round(sum(losses[-window:]) / window, 4),
        **watch.facts(),
    }
