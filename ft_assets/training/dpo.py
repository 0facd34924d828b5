"""Preference training on the SFT policy, which is the reference.

That is Direct Preference Optimization (Rafailov et al. 2023) of pairs, or KTO (Ethayarajh et al.
2024) of labelled answers, which label_trainer.py has.

The reference's log-probabilities are computed once, before the first step, from the policy itself
(reference.py), so they need no second copy of the weights. They are proven before the first step.
Losses and metrics are TRL's.
"""

import functools
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig

from ft_assets.compat import liger
from ft_assets.config import DpoSettings, LoraSettings
from ft_assets.data.split import MIN_VALIDATION_PAIRS
from ft_assets.hardware import compute_dtype
from ft_assets.job import Report
from ft_assets.models.loading import load_tokenizer
from ft_assets.models.sharding import held_weights
from ft_assets.training.adapter import trained_adapter
from ft_assets.training.callbacks import (
    Progress,
    SpeedMetrics,
    device_memory_gb,
    mfu_from_speed,
)
from ft_assets.training.label_trainer import ANSWERS, LabelTrainer, is_labelled, weights
from ft_assets.training.loop import Run, RunMetrics, train_to_the_end
from ft_assets.training.memory_plan.model_shape import snapshot_shape
from ft_assets.training.memory_plan.plan import Plan, PlanMetrics
from ft_assets.training.method_choice import resolve_method
from ft_assets.training.pair_loss import LABELS_MEASURED, MEASURED, PairLoss
from ft_assets.training.pair_trainer import PairTrainer, SharingMetrics
from ft_assets.training.pairs import (
    ReferencedPair,
    TokenPair,
    dataset_of,
    row_length,
    tokens_only,
    with_reference,
)
from ft_assets.training.prepare import (
    ModelMetrics,
    autocast_is_idle,
    checkpoint_layers,
    fuse_layers,
    memory_error,
    plan_dpo,
    this_machine,
)
from ft_assets.training.publish import publish
from ft_assets.training.reference import (
    Reference,
    data_version,
    prove_reference,
    read_reference,
    reference_key,
    score_reference,
    write_reference,
)
from ft_assets.training.trl_options import (
    trainer_options,
    trl_config,
    trl_errors_as_config_errors,
)
from ft_assets.training.validation import Validation, ValidationMetrics

PreferenceTrainer = PairTrainer | LabelTrainer


class ReferenceMetrics(SharingMetrics):
    """The proof of the reference: the largest difference in nats, and TRL's first loss."""

    reference_difference: float
    reference_loss: NotRequired[float]
    reference_reused: bool
    prompts_shared: bool


class Counts(TypedDict):
    """The numbers of pairs, or of labelled answers, that are trained and measured."""

    preference_method: Literal["dpo", "kto"]
    pairs: int
    validation_pairs: int
    labels: NotRequired[int]
    validation_labels: NotRequired[int]


class DpoMetrics(
    Counts,
    ReferenceMetrics,
    SpeedMetrics,
    ValidationMetrics,
    PlanMetrics,
    ModelMetrics,
    RunMetrics,
):
    """The metrics of a DPO training; memory in GB of 1e9 bytes, losses in TRL's unit."""

    train_tokens: int
    steps: int
    seconds: float
    loss_first: float
    loss_last: float
    reward_accuracy: float
    reward_margin: float
    peak_train_memory_gb: float
    memory_error_percent: NotRequired[float]
    held_weights_gb: NotRequired[float]


def train_dpo(
    *,
    snapshot: Path,
    sft_adapter: Path,
    pairs: Sequence[TokenPair],
    lora: LoraSettings,
    dpo: DpoSettings,
    checkpoints: Path,
    output: Path,
    report: Report,
    memory_limit_gb: float | None = None,
    validation: Sequence[TokenPair] = (),
) -> DpoMetrics:
    """Train from the SFT policy and save one adapter (SFT + DPO), or all weights, to `output`.

    Rows with a label, as `labelled` returns them, are trained by KTO.

    Resumes from `checkpoints` if it holds a complete checkpoint. The reference's log-probabilities
    are stored beside `checkpoints`, by a hash of what they depend on. `validation` pairs are
    measured and not trained on.

    Assumptions:
      - `pairs` are tokenized, non-empty, and none is longer than chat.max_length; both answers of a
        pair end with the end-of-turn token.
      - `sft_adapter` was trained on `snapshot`. It is the initial policy and the reference.
      - `output` exists and is empty.
      - With several ranks, each calls this function with the same arguments.

    Raises TrainingError if the reference is not proven or a weight is not finite, MemoryPlanError
    if the training cannot fit, and ConfigError for options that TRL refuses.
    """
    set_seed(dpo.seed)
    lora = resolve_method(sft_adapter, lora)
    machine = this_machine(memory_limit_gb)
    by_label = is_labelled(pairs)
    shared = dpo.share_prompts and not by_label
    plan = plan_dpo(snapshot, lora, dpo, pairs, machine, shared)
    report("plan", **plan.metrics())
    options = functools.partial(_options, dpo, checkpoints, lora)
    if by_label:
        options = functools.partial(_label_options, dpo, checkpoints, lora, weights(pairs))
    # Before weights load.
    trl_config(KTOConfig if by_label else DPOConfig, options(plan.micro_batch), "dpo")
    rows = [tokens_only(pair) for pair in pairs]
    model = trained_adapter(snapshot, lora, sft_adapter, plan.shards)
    fused = fuse_layers(model)
    policy = _Policy(
        model=model,
        idle={"bf16": False} if autocast_is_idle(model, fused.get("fused_linears", 0)) else {},
        tokenizer=load_tokenizer(snapshot),
        rows=rows,
        options=options,
        plan_without_sharing=lambda: plan_dpo(snapshot, lora, dpo, pairs, machine, shared=False),
    )
    policy.checkpoint(plan)

    begun = time.perf_counter()
    first_trainer, plan = policy.first_trainer(plan, shared, report)
    shares = first_trainer.shares
    proven = _prove(
        ReferenceStore.of(first_trainer, snapshot, sft_adapter, lora, plan, checkpoints),
        rows,
        [tokens_only(pair) for pair in validation],
        report,
    )
    trainers = [first_trainer]
    del first_trainer  # after a try that failed nothing may hold its trainer
    measured = LABELS_MEASURED if by_label else MEASURED
    loss = PairLoss(proven.validation, plan.micro_batch, measured)
    measure = loss if proven.validation else None
    reason = f": fewer than {MIN_VALIDATION_PAIRS} of the pairs would be validation pairs"
    watch = Validation(measure, dpo, "dpo", checkpoints, report, reason)
    progress = _progress(snapshot, rows, dpo, report, full=lora.method == "full", shares=shares)

    def build(micro_batch: int, callbacks: list[TrainerCallback]) -> PreferenceTrainer:
        trainer = trainers.pop() if trainers else policy.new_trainer(micro_batch, shares)
        for callback in (progress, watch, *callbacks):
            trainer.add_callback(callback)
        trainer.train_dataset = dataset_of(proven.rows)
        loss.trainer = trainer
        return trainer

    run = train_to_the_end(
        build,
        micro_batch=plan.micro_batch,
        effective_batch=dpo.effective_batch,
        checkpoints=checkpoints,
        report=report,
        key="dpo",
    )
    seconds = time.perf_counter() - begun
    progress.restore(run.trainer.state)
    watch.restore(run.trainer.state)
    publish("dpo", run.trainer.model, watch, progress.curve, plan, checkpoints, output)
    return _metrics(run, plan, fused, proven, watch, progress, seconds)


@dataclass(frozen=True)
class _Policy:
    """The loaded policy, and everything that makes a trainer of it."""

    model: Any
    tokenizer: Any
    rows: Sequence[TokenPair]
    options: Callable[[int], dict[str, Any]]  # of a micro-batch
    idle: dict[str, Any]  # what turns an autocast off that changes nothing
    plan_without_sharing: Callable[[], Plan]

    def checkpoint(self, plan: Plan) -> None:
        """Checkpoint the layers that the plan names."""
        adapted = isinstance(self.model, PeftModel)
        checkpoint_layers(self.model.get_base_model() if adapted else self.model, plan)

    def new_trainer(self, micro_batch: int, shares: bool) -> PreferenceTrainer:
        """Make a trainer. Raises ConfigError for options that TRL refuses."""
        options = {**self.options(micro_batch), **self.idle}
        with trl_errors_as_config_errors("dpo"):
            if is_labelled(self.rows):
                return LabelTrainer(
                    model=self.model,
                    args=KTOConfig(**options),
                    pairs=self.rows,
                    tokenizer=self.tokenizer,
                )
            return PairTrainer(
                model=self.model,
                args=DPOConfig(**options),
                pairs=self.rows,
                tokenizer=self.tokenizer,
                shares=shares,
            )

    def first_trainer(
        self, plan: Plan, wanted: bool, report: Report
    ) -> tuple[PreferenceTrainer, Plan]:
        """Return the first trainer and its plan.

        Prompts are shared if that is `wanted` and the check passes; otherwise a new plan is made.
        """
        trainer = self.new_trainer(plan.micro_batch, wanted)
        if isinstance(trainer, LabelTrainer) or not wanted or trainer.check_prompt_sharing():
            return trainer, plan
        report("the prompt of a pair is computed for each of its answers", **trainer.sharing)
        sharing = trainer.sharing
        plan = self.plan_without_sharing()
        self.checkpoint(plan)
        report("plan", **plan.metrics())
        trainer = self.new_trainer(plan.micro_batch, False)
        trainer.sharing = sharing
        return trainer, plan


def _train_tokens(rows: Sequence[TokenPair]) -> int:
    """Return the tokens of an epoch as TRL counts them: the prompt once for each answer."""
    if is_labelled(rows):
        return sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows)
    return sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in rows
    )


def _progress(
    snapshot: Path,
    rows: Sequence[TokenPair],
    dpo: DpoSettings,
    report: Report,
    *,
    full: bool,
    shares: bool,
) -> Progress:
    tokens = _train_tokens(rows)
    computed = sum(row_length(row) for row in rows) / tokens if shares else 1.0
    mfu = mfu_from_speed(snapshot_shape(snapshot), full, computed)
    step = dpo.effective_batch * (ANSWERS if is_labelled(rows) else 1)
    return Progress(report, tokens / len(rows) * step, dpo.max_loss_rise, mfu)


def _options(
    dpo: DpoSettings, checkpoints: Path, lora: LoraSettings, micro_batch: int
) -> dict[str, Any]:
    dpo = dpo.model_copy(update={"micro_batch": micro_batch})
    losses = [dpo.loss_type] if isinstance(dpo.loss_type, str) else dpo.loss_type
    options = trainer_options(dpo, "dpo", checkpoints, DPOConfig)
    if dpo.sft_weight:
        weights_of_losses = options.get("loss_weights") or [1.0] * len(losses)
        losses = [*losses, "sft"]
        options["loss_weights"] = [*weights_of_losses, dpo.sft_weight]
    return {
        "max_length": None,
        "beta": dpo.beta,
        "loss_type": losses,
        "remove_unused_columns": False,
        # Without it TRL loads a second model as the reference if there is no adapter.
        "precompute_ref_log_probs": lora.method == "full",
        **options,
    }


def _label_options(
    dpo: DpoSettings,
    checkpoints: Path,
    lora: LoraSettings,
    label_weights: dict[str, float],
    micro_batch: int,
) -> dict[str, Any]:
    """Return KTOConfig's options. Sizes count pairs, of which each is two labelled answers."""
    dpo = dpo.model_copy(update={"micro_batch": micro_batch})
    options = {**label_weights, **trainer_options(dpo, "dpo", checkpoints, KTOConfig)}
    return {
        "max_length": None,
        "beta": dpo.beta,
        "remove_unused_columns": False,
        "precompute_ref_log_probs": lora.method == "full",
        **options,
        "per_device_train_batch_size": ANSWERS * options["per_device_train_batch_size"],
    }


@dataclass(frozen=True)
class ReferenceStore:
    """Scores pairs under the untrained policy, or reads the scores of an earlier run.

    The scores of a set of pairs are in `folder`/reference-<key>/log_probabilities.json.
    """

    trainer: PreferenceTrainer
    folder: Path
    base_version: str
    adapter_version: str
    lora: LoraSettings
    how: dict[str, str | int | float | bool | None]
    batch: int

    @classmethod
    def of(
        cls,
        trainer: PreferenceTrainer,
        snapshot: Path,
        sft_adapter: Path,
        lora: LoraSettings,
        plan: Plan,
        checkpoints: Path,
    ) -> "ReferenceStore":
        """Make the store of a training; the key holds everything that changes the scores."""
        libraries = ("torch", "transformers", "peft")
        how: dict[str, str | int | float | bool | None] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "dtype": str(compute_dtype()),
            "micro_batch": plan.micro_batch,
            "shares": trainer.shares,
            "ld_alpha": trainer.ld_alpha,
            "liger": liger.installed(),
            **{name: importlib.metadata.version(name) for name in libraries},
        }
        return cls(
            trainer=trainer,
            folder=checkpoints.parent,
            base_version=data_version(snapshot),
            adapter_version=data_version(sft_adapter),
            lora=lora,
            how=how,
            batch=plan.micro_batch,
        )

    def reference(self, pairs: Sequence[TokenPair]) -> tuple[Reference, bool]:
        """Return the reference of `pairs`, and whether an earlier run stored it."""
        key = reference_key(self.base_version, self.adapter_version, self.lora, pairs, self.how)
        file = self.folder / f"reference-{key}" / "log_probabilities.json"
        stored = read_reference(file, len(pairs))
        # Before one rank writes it: the ranks of a sharded base must all score, or none.
        self.trainer.accelerator.wait_for_everyone()
        if stored is not None:
            return stored, True
        reference = score_reference(self.trainer, pairs, self.batch)
        write_reference(file, reference)
        return reference, False


@dataclass(frozen=True)
class ProvenPairs:
    """Training and validation pairs with the reference's log-probabilities, and the proof."""

    rows: Sequence[ReferencedPair]
    validation: Sequence[ReferencedPair]
    metrics: ReferenceMetrics


def _prove(
    store: ReferenceStore,
    rows: Sequence[TokenPair],
    validation: Sequence[TokenPair],
    report: Report,
) -> ProvenPairs:
    """Add the reference's log-probabilities to all pairs, and prove those of `rows`."""
    reference, reused = store.reference(rows)
    referenced = _referenced(rows, reference)
    watched = _referenced(validation, store.reference(validation)[0]) if validation else []
    trainer = store.trainer
    trainer.train_dataset = dataset_of(referenced)
    difference, loss = prove_reference(trainer, rows, reference)
    metrics: ReferenceMetrics = {
        "reference_difference": difference,
        "reference_reused": reused,
        "prompts_shared": trainer.shares,
        **trainer.sharing,
    }
    if loss is not None:
        metrics["reference_loss"] = round(loss, 5)
    report("reference proven", pairs=len(rows), **metrics)
    return ProvenPairs(referenced, watched, metrics)


def _referenced(pairs: Sequence[TokenPair], reference: Reference) -> list[ReferencedPair]:
    return [
        with_reference(pair, *values) for pair, values in zip(pairs, reference.values, strict=True)
    ]


def _counts(proven: ProvenPairs) -> Counts:
    rows, validation = len(proven.rows), len(proven.validation)
    if not is_labelled(proven.rows):
        return Counts(preference_method="dpo", pairs=rows, validation_pairs=validation)
    return Counts(
        preference_method="kto",
        pairs=0,
        validation_pairs=0,
        labels=rows,
        validation_labels=validation,
    )


def _metrics(
    run: Run,
    plan: Plan,
    fused: ModelMetrics,
    proven: ProvenPairs,
    watch: Validation,
    progress: Progress,
    seconds: float,
) -> DpoMetrics:
    first, last = progress.curve[0], progress.curve[-1]
    return {
        **_counts(proven),
        "train_tokens": _train_tokens(proven.rows),
        "steps": run.trainer.state.global_step,
        "seconds": round(seconds, 1),
        **progress.speed(),
        **proven.metrics,
        "loss_first": first["loss"],
        "loss_last": last["loss"],
        "reward_accuracy": last.get("reward_accuracies", 0.0),
        "reward_margin": last.get("reward_margins", 0.0),
        **watch.metrics(),
        "peak_train_memory_gb": round(device_memory_gb(), 3),
        **plan.metrics(),
        **fused,
        **memory_error(plan),
        **held_weights(run.trainer.model),
        **run.metrics,
    }
