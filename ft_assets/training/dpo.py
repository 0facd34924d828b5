"""Direct Preference Optimization (Rafailov et al. 2023) on top of the SFT policy, with the SFT policy as reference.

The reference's log-probabilities are computed once, before the first step, from the policy itself (reference.py), so it
costs no second copy of the weights. That it is right is proven before the first step. Losses and metrics are TRL's.
"""

import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ft_assets.compat.transformers import prepare_inputs
from ft_assets.compat.trl import drop_reference_copy, expect_reference_scores, fused_head
from ft_assets.config import DpoSettings, LoraSettings
from ft_assets.data.split import MIN_VALIDATION_PAIRS
from ft_assets.errors import TrainingError
from ft_assets.hardware import compute_dtype
from ft_assets.job import Report
from ft_assets.models.loading import load_tokenizer
from ft_assets.models.sharding import held_weights
from ft_assets.training.adapter import is_finite, trained_adapter
from ft_assets.training.callbacks import Progress, device_memory_gb, gpu_share
from ft_assets.training.dropout import without_dropout
from ft_assets.training.length_order import LengthOrder
from ft_assets.training.loop import train_to_the_end
from ft_assets.training.memory_plan.model_shape import snapshot_shape
from ft_assets.training.memory_plan.plan import Plan
from ft_assets.training.method_choice import chosen_method, save_choice
from ft_assets.training.pair_loss import PairLoss
from ft_assets.training.pairs import PairCollator, SharedPrompts, row_length
from ft_assets.training.prepare import (
    checkpoint_layers,
    full_precision_adapter,
    memory_facts,
    plan_dpo,
    this_machine,
)
from ft_assets.training.reference import (
    EXACT_A_TOKEN,
    ROUNDING_A_TOKEN,
    TIMES_NOISE,
    Reference,
    data_version,
    half_precision,
    prove_reference,
    read_reference,
    reference_key,
    score_reference,
    write_reference,
)
from ft_assets.training.trackers import keep_events
from ft_assets.training.trl_options import ToldOptions, told, trainer_options, trl_config
from ft_assets.training.validation import LogsValidation, Validation, save_kept

ANSWERS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairTrainer(LogsValidation, ToldOptions, DPOTrainer):
    """DPOTrainer for rows that have prompt_ids, chosen_ids and rejected_ids, and the reference's log-probabilities.

    `shares`: whether a pair's prompt is computed once; found false if the model cannot be asked so (see `settle`), or if the
    loss needs what only TRL's own pass gives: WPO's weights, or the load of a mixture's experts.
    """

    key = "dpo"

    def __init__(
        self,
        *,
        model: Any,
        args: DPOConfig,
        pairs: list[dict[str, Any]],
        tokenizer: Any,
        shares: bool,
        **kwargs: Any,
    ) -> None:
        self.pairs = pairs
        self.sharing: dict[str, float] = {}  # what `settle` measured
        rows = [{"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0, **pair} for pair in pairs]
        multiple: Any = args.pad_to_multiple_of
        exact = {
            name: weight.data for name, weight in model.named_parameters() if weight.requires_grad
        }
        collator = PairCollator(pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=multiple)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **kwargs,
        )
        drop_reference_copy(self.model)  # it is not needed
        full_precision_adapter(
            model, exact
        )  # before the reference is scored, and before there is an optimizer
        expect_reference_scores(self)
        self.shares = shares and not (self.use_weighting or self.aux_loss_enabled)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # tokenized and proven before

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # reference.py's

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthOrder:
        step = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return LengthOrder(
            [row_length(pair) for pair in self.pairs], step, self.args.data_seed or self.args.seed
        )

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        theirs = {name: value for name, value in inputs.items() if not name.startswith("shared_")}
        return super()._compute_loss(
            SharedPrompts(model, inputs) if self.shares else model, theirs, return_outputs
        )

    def token_scores(self, inputs: Any, shares: bool) -> torch.Tensor:
        """Return the log-probability of each answer token, (2B, L-1), zero elsewhere."""
        model: Any = SharedPrompts(self.model, inputs) if shares else self.model
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return fused_head(model, **asked, labels=labels, use_cache=False).log_probs

    def log_probabilities(self, inputs: Any) -> torch.Tensor:
        """Return the summed log-probability of each answer in nats, (2B,), chosen first; with ld_alpha as TRL weighs it."""
        scores = self.token_scores(inputs, self.shares)
        if self.ld_alpha is None:
            return scores.sum(1)
        mask = inputs["completion_mask"][:, 1:]
        lengths = mask.sum(1)
        both = torch.minimum(*lengths.chunk(2)).repeat(2).unsqueeze(1)
        place = mask.cumsum(1)
        return (scores * (place <= both)).sum(1) + self.ld_alpha * (scores * (place > both)).sum(1)

    def answer_scores(self, pairs: list[dict[str, Any]], shares: bool) -> list[torch.Tensor]:
        """Return the log-probabilities of each answer's tokens: of the chosen ones, then of the rejected ones."""
        batch = prepare_inputs(
            self,
            self.data_collator(
                [{**pair, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for pair in pairs]
            ),
        )
        scored = batch["completion_mask"][:, 1:] == 1
        return [
            row[places]
            for row, places in zip(self.token_scores(batch, shares), scored, strict=True)
        ]

    def settle(self) -> bool:
        """Score the first pairs as TRL does, with the prompt shared, and shared with the two answers in the other order.
        Share prompts only if all three agree; a model that does not heed the mask or the positions sees one answer in the
        other. How far rounding may take them apart is measured: by the same pairs, each scored alone. Returns `shares`."""
        if not self.shares:
            return False
        few = self.pairs[:4]
        turned = [
            {**pair, "chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]}
            for pair in few
        ]
        with without_dropout(self.model), torch.no_grad(), self.accelerator.autocast():
            theirs = self.answer_scores(few, False)
            alone = [self.answer_scores([pair], False) for pair in few]
            try:
                ours, again = self.answer_scores(few, True), self.answer_scores(turned, True)
            except (
                RuntimeError,
                ValueError,
                TypeError,
                KeyError,
            ):  # a model that takes no such mask
                self.shares = False
                return False
        noise = _apart(theirs, [answers[side] for side in (0, 1) for answers in alone])
        difference = max(_apart(ours, theirs), _apart(ours, again[len(few) :] + again[: len(few)]))
        least = ROUNDING_A_TOKEN if half_precision(self) else EXACT_A_TOKEN
        self.shares = difference <= max(least, TIMES_NOISE * noise)
        self.sharing = {
            "sharing_difference": round(difference, 6),
            "sharing_noise": round(noise, 6),
        }
        return self.shares


def _apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the mean difference of the tokens' log-probabilities in nats."""
    return float((torch.cat(one) - torch.cat(other)).abs().mean())


def train_dpo(
    snapshot: Path,
    sft_adapter: Path,
    pairs: list[dict[str, Any]],
    lora: LoraSettings,
    dpo: DpoSettings,
    checkpoints: Path,
    output: Path,
    report: Report,
    memory_limit_gb: float | None = None,
    validation: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train from the SFT policy and save one adapter (SFT + DPO), or all weights, to `output`. `validation`: pairs that are
    watched and not trained on. Returns metrics; raises TrainingError. The reference's log-probabilities are kept beside
    `checkpoints`, by what they depend on."""
    set_seed(dpo.seed)
    tokenizer = load_tokenizer(snapshot)
    lora = chosen_method(sft_adapter, lora)
    machine = this_machine(memory_limit_gb)
    plan = plan_dpo(snapshot, lora, dpo, pairs, machine, dpo.share_prompts)
    report("plan", **plan.facts())

    def options(micro_batch: int) -> dict[str, Any]:
        return _options(dpo.model_copy(update={"micro_batch": micro_batch}), checkpoints, lora)

    trl_config(DPOConfig, options(plan.micro_batch), "dpo")  # before weights load
    model = trained_adapter(snapshot, lora, sft_adapter, plan.shards)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    checkpoint_layers(base, plan)
    rows, watched = (
        [{name: row[name] for name in ANSWERS} for row in part]
        for part in (pairs, validation or [])
    )
    tokens = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in rows
    )

    def new_trainer(micro_batch: int, shares: bool) -> PairTrainer:
        with told("dpo"):
            return PairTrainer(
                model=model,
                args=DPOConfig(**options(micro_batch)),
                pairs=rows,
                tokenizer=tokenizer,
                shares=shares,
            )

    def padded() -> Plan:
        apart = plan_dpo(snapshot, lora, dpo, pairs, machine, shared=False)
        checkpoint_layers(base, apart)
        return apart

    begun = time.perf_counter()
    prepared, plan = _settled(plan, dpo.share_prompts, new_trainer, padded, report)
    shares = prepared.shares
    proofs = _prepare(
        prepared, snapshot, sft_adapter, rows, watched, lora, plan.micro_batch, checkpoints, report
    )
    trainers = [prepared]
    del prepared  # a try that failed leaves its trainer behind
    loss = PairLoss(watched, plan.micro_batch)
    unwatched = f": of the pairs, fewer than {MIN_VALIDATION_PAIRS} would be watched"
    watch = Validation(loss if watched else None, dpo, "dpo", checkpoints, report, unwatched)
    computed = sum(row_length(row) for row in rows) / tokens if shares else 1.0
    share_of_gpu = gpu_share(snapshot_shape(snapshot), lora.method == "full", computed)
    progress = Progress(
        report, tokens / len(rows) * dpo.effective_batch, dpo.max_loss_rise, share_of_gpu
    )

    def build(micro_batch: int, callbacks: list[TrainerCallback]) -> PairTrainer:
        trainer = trainers.pop() if trainers else new_trainer(micro_batch, shares)
        for callback in (progress, watch, *callbacks):
            trainer.add_callback(callback)
        trainer.train_dataset = Dataset.from_list(rows)
        loss.trainer = trainer
        return trainer

    run = train_to_the_end(build, plan.micro_batch, dpo.effective_batch, checkpoints, report, "dpo")
    seconds = time.perf_counter() - begun
    trainer = run.trainer
    progress.restore(trainer.state)
    watch.restore(trainer.state)
    if not is_finite(trainer.model):
        raise TrainingError(
            where="dpo",
            found="the adapter holds values that are not finite",
            expected="finite weights",
            fix="lower dpo.learning_rate",
        )
    save_kept(trainer.model, watch, progress.curve, output)
    keep_events(checkpoints, output)
    save_choice(plan, output)
    first, last = progress.curve[0], progress.curve[-1]
    return {
        "pairs": len(pairs),
        "validation_pairs": len(watched),
        "train_tokens": tokens,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        **progress.speed(),
        **proofs,
        "loss_first": first["loss"],
        "loss_last": last["loss"],
        "reward_accuracy": last.get("reward_accuracies", 0.0),
        "reward_margin": last.get("reward_margins", 0.0),
        **watch.facts(),
        "peak_train_memory_gb": round(device_memory_gb(), 3),
        **plan.facts(),
        **memory_facts(plan),
        **held_weights(trainer.model),
        **run.facts(),
    }


def _settled(
    plan: Plan,
    wanted: bool,
    new_trainer: Callable[[int, bool], PairTrainer],
    padded: Callable[[], Plan],
    report: Report,
) -> tuple[PairTrainer, Plan]:
    """Return the first trainer and its plan: with shared prompts where that is `wanted` and right, else as `padded` plans."""
    trainer = new_trainer(plan.micro_batch, wanted)
    if not wanted or trainer.settle():
        return trainer, plan
    report("the prompt of a pair is computed for each of its answers", **trainer.sharing)
    sharing, plan = trainer.sharing, padded()
    report("plan", **plan.facts())
    trainer = new_trainer(plan.micro_batch, False)
    trainer.sharing = sharing
    return trainer, plan


def _options(dpo: DpoSettings, checkpoints: Path, lora: LoraSettings) -> dict[str, Any]:
    return {
        "max_length": None,
        "beta": dpo.beta,
        "loss_type": dpo.loss_type,
        "remove_unused_columns": False,
        # Without an adapter TRL would load a second model as the reference unless it is told so.
        "precompute_ref_log_probs": lora.method == "full",
        **trainer_options(dpo, "dpo", checkpoints, DPOConfig),
    }


def _prepare(
    trainer: PairTrainer,
    snapshot: Path,
    sft_adapter: Path,
    rows: list[dict[str, Any]],
    watched: list[dict[str, Any]],
    lora: LoraSettings,
    micro_batch: int,
    checkpoints: Path,
    report: Report,
) -> dict[str, Any]:
    """Add the reference's log-probabilities to `rows` and `watched`, and prove the former. Returns what is said of it in the
    metrics."""
    how = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": str(compute_dtype()),
        "micro_batch": micro_batch,
        "shares": trainer.shares,
        "ld_alpha": trainer.ld_alpha,
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    versions = data_version(snapshot), data_version(sft_adapter)

    def referred(pairs: list[dict[str, Any]], batch: int = micro_batch) -> tuple[Reference, bool]:
        """Add the reference to pairs. Returns it, and whether it was kept from before."""
        file = (
            checkpoints.parent
            / f"reference-{reference_key(*versions, lora, pairs, how)}"
            / "log_probabilities.json"
        )
        kept = read_reference(file, len(pairs))
        trainer.accelerator.wait_for_everyone()  # before one writes it: ranks that divide the base must all score, or none
        reference = kept or score_reference(trainer, pairs, batch)
        if kept is None:
            write_reference(file, reference)
        for row, (chosen, rejected) in zip(pairs, reference.values, strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = chosen, rejected
        return reference, kept is not None

    reference, reused = referred(rows)
    if watched:
        referred(watched)
    trainer.train_dataset = Dataset.from_list(rows)
    difference, loss = prove_reference(trainer, rows, reference)
    facts = {
        "reference_difference": difference,
        "reference_loss": round(loss, 5),
        "reference_reused": reused,
        "prompts_shared": trainer.shares,
        **trainer.sharing,
    }
    report("reference proven", pairs=len(rows), **facts)
    return facts
