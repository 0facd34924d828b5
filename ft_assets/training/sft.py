"""Supervised fine-tuning with TRL on rows that are already tokenized, masked and proven.

The trainer gets `input_ids` and `labels`, so it neither renders nor tokenizes again: it trains on
exactly what was proven. Labels are -100 outside the assistant's answers and their end of turn.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ft_assets.config import LoraSettings, SftSettings, TextSettings
from ft_assets.errors import TrainingError
from ft_assets.hardware import free_unused
from ft_assets.job import Report
from ft_assets.models.loading import load_tokenizer
from ft_assets.models.padding import padding_token
from ft_assets.models.sharding import held_weights
from ft_assets.rows.types import TokenSequence
from ft_assets.training.adapter import (
    TrainableMetrics,
    largest_update,
    new_adapter,
    require_finite,
    trainable_share,
    trained_adapter,
)
from ft_assets.training.callbacks import (
    Progress,
    SpeedMetrics,
    device_memory_gb,
    mfu_from_speed,
)
from ft_assets.training.checkpoints import last_whole
from ft_assets.training.cpu_loss import CpuSFTTrainer
from ft_assets.training.distributed import world_size
from ft_assets.training.embedding_rate import EmbeddingRate
from ft_assets.training.fp8_probe import Fp8Error
from ft_assets.training.loop import Run, RunMetrics, train_to_the_end
from ft_assets.training.memory_plan.model_shape import snapshot_shape
from ft_assets.training.memory_plan.plan import Machine, Plan, bf16_reason
from ft_assets.training.method_choice import plan_once, save_plan
from ft_assets.training.prepare import (
    PreparedMetrics,
    PreparedModel,
    WholeSteps,
    autocast_is_idle,
    full_precision_adapter,
    memory_error,
    plan_again,
    plan_sft,
    prepare_model,
    this_machine,
)
from ft_assets.training.trackers import keep_events
from ft_assets.training.trl_options import (
    ReportsTrlErrors,
    trainer_options,
    trl_config,
    trl_errors_as_config_errors,
)
from ft_assets.training.validation import (
    LogsValidation,
    Measure,
    Validation,
    ValidationMetrics,
    answer_loss,
    save_result,
)

# Of the validation rows, the plan and the padding token; None if nothing is to be measured.
MeasureOf = Callable[[Sequence[TokenSequence], Plan, int], Measure | None]


class LossMetrics(ValidationMetrics):
    """The largest update of a weight, and the mean loss of the first and the last tenth of steps.

    Losses are in nats per token.
    """

    largest_update: float
    loss_first: float
    loss_last: float


class SftMetrics(LossMetrics, TrainableMetrics, SpeedMetrics, PreparedMetrics, RunMetrics):
    """The metrics of supervised fine-tuning; memory in GB of 1e9 bytes."""

    train_rows: int
    train_tokens: int
    supervised_tokens: int
    steps: int
    seconds: float
    peak_train_memory_gb: float
    memory_error_percent: NotRequired[float]
    held_weights_gb: NotRequired[float]


class SftRow(TypedDict):
    """A row for TRL: the label of a token is its id, or -100 where the loss skips it."""

    input_ids: list[int]
    labels: list[int]


class ResumingSFTTrainer(LogsValidation, ReportsTrlErrors, WholeSteps, EmbeddingRate, SFTTrainer):
    """SFTTrainer with complete checkpoints and whole steps."""

    key = "sft"


class ResumingCpuSFTTrainer(
    LogsValidation, ReportsTrlErrors, WholeSteps, EmbeddingRate, CpuSFTTrainer
):
    """The same with the loss for a CPU."""

    key = "sft"


def labels(row: TokenSequence) -> list[int]:
    """Return the labels of a tokenized row: its ids where supervised, -100 elsewhere."""
    return [
        token if flag else -100
        for token, flag in zip(row["input_ids"], row["supervised"], strict=True)
    ]


def train_sft(
    *,
    snapshot: Path,
    rows: Sequence[TokenSequence],
    validation: Sequence[TokenSequence],
    lora: LoraSettings,
    sft: SftSettings,
    checkpoints: Path,
    output: Path,
    report: Report,
    memory_limit_gb: float | None = None,
    before: Path | None = None,
    measure: MeasureOf = answer_loss,
) -> SftMetrics:
    """Train and save the adapter, or all weights, to `output`.

    `before`: a trained adapter, or trained weights, of the same base and settings, which this
    training continues. `measure` makes the measurement of the validation rows.

    Resumes from `checkpoints` if it holds a complete checkpoint. `validation` rows are measured and
    not trained on.

    Assumptions:
      - `rows` are tokenized in the model's own chat template, non-empty, and none is longer than
        chat.max_length; each has at least one supervised token.
      - `snapshot` holds a causal language model in 16-bit safetensors with its tokenizer.
      - `output` exists and is empty.
      - With several ranks, each calls this function with the same arguments.

    Raises TrainingError if nothing was learned or a weight is not finite, MemoryPlanError if the
    training cannot fit, and ConfigError for options that TRL refuses.
    """
    tokenizer = load_tokenizer(snapshot)
    machine = this_machine(memory_limit_gb)
    wanted = _Wanted(snapshot, rows, lora, sft, machine, checkpoints, tokenizer, before)
    start = _start(wanted, report)
    model, prepared, lora, sft = start.model, start.prepared, start.lora, start.sft
    plan = prepared.plan
    progress = _progress(snapshot, rows, sft, report, full=lora.method == "full")
    watch = _validation(
        validation, prepared, lora, sft, tokenizer.pad_token_id, checkpoints, report, measure
    )
    report("loaded", rows=len(rows), tokens=_tokens(rows), **start.share)
    continued = before is not None
    new_trainer = _trainer_factory(model, prepared, rows, tokenizer, sft, checkpoints, continued)

    def build(micro_batch: int, callbacks: list[TrainerCallback]) -> SFTTrainer:
        return new_trainer(micro_batch, [progress, watch, *callbacks])

    begun = time.perf_counter()
    run = train_to_the_end(
        build,
        micro_batch=plan.micro_batch,
        effective_batch=sft.effective_batch,
        checkpoints=checkpoints,
        report=report,
        key=sft.KEY,
    )
    seconds = time.perf_counter() - begun
    progress.restore(run.trainer.state)
    watch.restore(run.trainer.state)
    losses = _save(run.trainer.model, wanted, progress, watch, output)
    save_plan(plan, output)
    return _metrics(run, prepared, rows, start.share, losses, progress, seconds)


@dataclass(frozen=True)
class _Wanted:
    """What is to be trained, and where."""

    snapshot: Path
    rows: Sequence[TokenSequence]
    lora: LoraSettings
    sft: SftSettings
    machine: Machine
    checkpoints: Path
    tokenizer: Any
    before: Path | None = None

    def plan(self, lora: LoraSettings) -> Plan:
        return plan_sft(self.snapshot, lora, self.sft, self.rows, self.machine)


@dataclass(frozen=True)
class _Start:
    """The prepared model, and the settings as the plan resolved them."""

    model: Any
    prepared: PreparedModel
    lora: LoraSettings
    sft: SftSettings
    share: TrainableMetrics


def _start(wanted: _Wanted, report: Report) -> _Start:
    """Plan, load and prepare the model.

    With lora.base_compute: auto, a base that fails the proof of FP8 is loaded again for bf16. A
    training that was begun in FP8 is not continued in bf16.
    """
    if wanted.lora.base_compute == "auto" and (reason := bf16_reason(wanted.lora, wanted.machine)):
        report(f"products with the base are in 16 bits: {reason}")
    try:
        return _load(wanted, report)
    except Fp8Error as error:
        if wanted.lora.base_compute != "auto" or last_whole(wanted.checkpoints, report):
            raise
        report(f"products with the base stay in 16 bits: {error.found}")
    free_unused()
    lora = wanted.lora.model_copy(update={"base_compute": "bf16"})
    return _load(dataclasses.replace(wanted, lora=lora), report)


def _load(wanted: _Wanted, report: Report) -> _Start:
    set_seed(wanted.sft.seed)
    plan = plan_once(wanted.lora, wanted.checkpoints, wanted.plan, report)
    compute = "fp8" if plan.fp8 else "bf16"
    lora = wanted.lora.model_copy(update={"method": plan.method, "base_compute": compute})
    sft = wanted.sft.model_copy(update={"micro_batch": plan.micro_batch})
    trl_config(SFTConfig, _options(sft, wanted.checkpoints), sft.KEY)  # before weights load
    if wanted.before is None:
        model = new_adapter(wanted.snapshot, lora, plan.shards)
    else:
        model = trained_adapter(wanted.snapshot, lora, wanted.before, plan.shards)
    share = trainable_share(model)
    again = functools.partial(
        plan_again, plan, wanted.snapshot, lora, wanted.sft, wanted.rows, wanted.machine
    )
    pad = padding_token(model, wanted.tokenizer)
    prepared = prepare_model(model, plan, sft, wanted.rows, pad, report, again)
    return _Start(model, prepared, lora, sft, share)


def _tokens(rows: Sequence[TokenSequence]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def _options(sft: SftSettings, checkpoints: Path) -> dict[str, Any]:
    return {"max_length": None, **trainer_options(sft, sft.KEY, checkpoints, SFTConfig)}


def _progress(
    snapshot: Path, rows: Sequence[TokenSequence], sft: SftSettings, report: Report, *, full: bool
) -> Progress:
    mfu = mfu_from_speed(snapshot_shape(snapshot), full)
    per_step = _tokens(rows) / len(rows) * sft.effective_batch
    return Progress(report, per_step, sft.max_loss_rise, mfu)


def _validation(
    rows: Sequence[TokenSequence],
    prepared: PreparedModel,
    lora: LoraSettings,
    sft: SftSettings,
    pad: int,
    checkpoints: Path,
    report: Report,
    measure: MeasureOf,
) -> Validation:
    """Make the measurement of the validation rows.

    With QLoRA on a CPU nothing is measured: in the first pass in evaluation mode bitsandbytes
    repacks NF4 weights for good, and LoRA gradients are zero after it.
    """
    reason = ""
    if rows and lora.method == "qlora" and not torch.cuda.is_available():
        rows = []
        reason = ": bitsandbytes' inference pass on a CPU would spoil the weights for training"
    measured = measure(rows, prepared.plan, pad)
    return Validation(measured, sft, sft.KEY, checkpoints, report, reason)


def _trainer_factory(
    model: Any,
    prepared: PreparedModel,
    rows: Sequence[TokenSequence],
    tokenizer: Any,
    sft: SftSettings,
    checkpoints: Path,
    continued: bool,
) -> Callable[[int, list[TrainerCallback]], SFTTrainer]:
    """Return a function (micro-batch, callbacks) that makes a trainer of the prepared model."""
    # The loss for a CPU bypasses DDP.
    alone_on_cpu = not torch.cuda.is_available() and world_size() == 1
    kind = ResumingCpuSFTTrainer if alone_on_cpu else ResumingSFTTrainer
    fused = prepared.metrics.get("fused_linears", 0)
    idle = {"bf16": False} if autocast_is_idle(model, fused) else {}
    table = [SftRow(input_ids=row["input_ids"], labels=labels(row)) for row in rows]
    dataset = Dataset.from_list(table)  # type: ignore[arg-type]
    # TRL rounds a trained adapter on an NF4 base; before there is a trainer, it is exact.
    exact = {
        name: weight.detach().clone()
        for name, weight in model.named_parameters()
        if continued and prepared.plan.method == "qlora" and weight.requires_grad
    }

    def new_trainer(micro_batch: int, callbacks: list[TrainerCallback]) -> SFTTrainer:
        settings = sft.model_copy(update={"micro_batch": micro_batch})
        options = {**_options(settings, checkpoints), **idle}
        with trl_errors_as_config_errors(sft.KEY):
            trainer = kind(
                model=model,
                args=SFTConfig(**options),
                train_dataset=dataset,
                data_collator=prepared.collator,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        trainer.key, trainer.packed = sft.KEY, prepared.plan.packed
        if isinstance(sft, TextSettings):
            trainer.embedding_rate = sft.embedding_learning_rate
        full_precision_adapter(model, exact)
        exact.clear()  # after out of memory, the weights are those of the step before
        return trainer

    return new_trainer


def _unchanged(sft: SftSettings, steps: int) -> str:
    """Return what to do when `steps` optimizer steps have changed nothing."""
    key = sft.KEY
    if sft.warmup_steps >= 1 and steps <= 1:
        return (
            f"lower {key}.warmup_steps to 0: the learning rate of a warmup's first step is 0, and "
            f"there is one step; or take more, by a smaller {key}.effective_batch or more epochs"
        )
    return f"raise {key}.learning_rate or the number of steps"


def _save(
    model: Any, wanted: _Wanted, progress: Progress, watch: Validation, output: Path
) -> LossMetrics:
    key = wanted.sft.KEY
    require_finite(model, key)
    save_result(model, watch, progress.curve, output)
    update = largest_update(output, wanted.snapshot, wanted.before)
    if update == 0.0:
        raise TrainingError(
            where=key,
            found="no trained weight has changed",
            expected="an adapter that training has changed",
            fix=_unchanged(wanted.sft, len(progress.curve)),
        )
    keep_events(wanted.checkpoints, output)
    losses = [entry["loss"] for entry in progress.curve]
    window = max(1, len(losses) // 10)
    return {
        "largest_update": update,
        "loss_first": round(sum(losses[:window]) / window, 4),
        "loss_last": round(sum(losses[-window:]) / window, 4),
        **watch.metrics(),
    }


def _metrics(
    run: Run,
    prepared: PreparedModel,
    rows: Sequence[TokenSequence],
    share: TrainableMetrics,
    losses: LossMetrics,
    progress: Progress,
    seconds: float,
) -> SftMetrics:
    return {
        **losses,
        **share,
        "train_rows": len(rows),
        "train_tokens": _tokens(rows),
        "supervised_tokens": sum(sum(row["supervised"]) for row in rows),
        "steps": run.trainer.state.global_step,
        "seconds": round(seconds, 1),
        **progress.speed(),
        "peak_train_memory_gb": round(device_memory_gb(), 3),
        **prepared.metrics,
        **memory_error(prepared.plan),
        **held_weights(run.trainer.model),
        **run.metrics,
    }
