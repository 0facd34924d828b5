"""Reinforcement learning from the SFT policy: GRPO (Shao et al. 2024) or RLOO (Ahmadian 2024).

The policy answers prompts of the training rows, rewards score the answers, and answers that are
better than the others of their group get more likely. The SFT policy is the reference of the KL
divergence, proven before the first step. Losses are TRL's.
Not here: what a reward is (evaluation/own_scores.py).
"""

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.rloo_config import RLOOConfig

from ft_assets.compat.trl import as_reference, fused_head
from ft_assets.config import LoraSettings, RlSettings
from ft_assets.errors import ConfigError, TrainingError
from ft_assets.job import Report
from ft_assets.models.adapter_files import is_full
from ft_assets.models.loading import load_tokenizer, stop_ids
from ft_assets.training.adapter import trained_adapter
from ft_assets.training.callbacks import Progress, SpeedMetrics, device_memory_gb
from ft_assets.training.loop import Run, RunMetrics, train_to_the_end
from ft_assets.training.memory_plan.plan import Plan, PlanMetrics
from ft_assets.training.method_choice import resolve_method
from ft_assets.training.prepare import checkpoint_layers, memory_error, plan_rl, this_machine
from ft_assets.training.publish import publish
from ft_assets.training.reference import TOLERANCE
from ft_assets.training.rl_trainer import (
    Given,
    GroupTrainer,
    LeaveOneOutTrainer,
    Prompt,
    Reward,
    Rollout,
)
from ft_assets.training.trl_options import (
    trainer_options,
    trl_config,
    trl_errors_as_config_errors,
)
from ft_assets.training.validation import Validation, ValidationMetrics

KINDS = {"grpo": (GRPOConfig, GroupTrainer), "rloo": (RLOOConfig, LeaveOneOutTrainer)}
PROVEN = 8  # prompts whose references are scored before the first step


class CurveMetrics(SpeedMetrics, ValidationMetrics, PlanMetrics, RunMetrics):
    """What the steps of an RL training measured; memory in GB of 1e9 bytes.

    kl_first, kl_last: TRL's estimate of the KL divergence in nats a token, before the first step
    and before the last. sampled_tokens_per_s: of this run. sampling_share: of its seconds.
    """

    steps: int
    seconds: float
    sampled_tokens: int
    sampled_tokens_per_s: NotRequired[float]
    sampling_share: NotRequired[float]
    reward_first: float
    reward_last: float
    kl_first: float
    kl_last: float
    loss_first: float
    loss_last: float
    peak_train_memory_gb: float
    memory_error_percent: NotRequired[float]


class RlMetrics(CurveMetrics):
    """The metrics of an RL training.

    reference_difference: the largest difference of policy and reference before the first step, in
    nats.
    """

    rl_method: str
    prompts: int
    validation_prompts: int
    rewards: str
    reference_difference: float


def train_rl(
    *,
    snapshot: Path,
    sft_adapter: Path,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    lora: LoraSettings,
    rl: RlSettings,
    max_new_tokens: int,
    checkpoints: Path,
    output: Path,
    report: Report,
    watched: Sequence[Reward] = (),
    validation: Sequence[Prompt] = (),
    memory_limit_gb: float | None = None,
    batch_size: int | None = None,
) -> RlMetrics:
    """Train from the SFT policy and save one adapter (SFT + RL) to `output`.

    Resumes from `checkpoints` if it holds a complete checkpoint. `validation` prompts are answered
    greedily, and scored by the rewards and by `watched`, which are not trained on. `batch_size`: of
    sampling.

    Raises ConfigError for options that TRL refuses, and for fewer prompts than a step has,
    TrainingError if the reference is not proven or a weight is not finite, and MemoryPlanError if
    the training cannot fit.
    """
    _require_steps(prompts, rl)
    set_seed(rl.seed)
    lora = _adapter_method(sft_adapter, lora)
    plan = plan_rl(
        snapshot,
        lora,
        rl,
        [len(prompt.ids) + max_new_tokens for prompt in prompts],
        this_machine(memory_limit_gb),
    )
    report("plan", **plan.metrics())
    trl_config(KINDS[rl.method][0], _options(rl, checkpoints, plan.micro_batch), "rl")
    rollout = Rollout(
        tokenizer=load_tokenizer(snapshot),
        stops=stop_ids(snapshot),
        max_new_tokens=max_new_tokens,
        temperature=rl.temperature,
        seed=rl.seed,
        batch_size=batch_size,
        told=functools.cache(report),
    )
    policy = _Policy.load(snapshot, sft_adapter, lora, rl, prompts, rewards, rollout, checkpoints)
    checkpoint_layers(policy.model.get_base_model(), plan)

    begun = time.perf_counter()
    trainers = [policy.new_trainer(plan.micro_batch)]
    difference = _prove_reference(trainers[0], prompts, report)
    measure = _Measure(rollout, validation, rewards, watched)
    watch = Validation(
        measure if validation else None, rl, "rl", checkpoints, report, ": no validation rows"
    )
    progress = Progress(report, None, rl.max_loss_rise)

    def build(micro_batch: int, callbacks: list[TrainerCallback]) -> Any:
        trainer = trainers.pop() if trainers else policy.new_trainer(micro_batch)
        for callback in (progress, watch, *callbacks):
            trainer.add_callback(callback)
        measure.trainer = trainer
        return trainer

    run = train_to_the_end(
        build,
        micro_batch=plan.micro_batch,
        effective_batch=rl.effective_batch,
        checkpoints=checkpoints,
        report=report,
        key="rl",
    )
    seconds = time.perf_counter() - begun
    progress.restore(run.trainer.state)
    watch.restore(run.trainer.state)
    publish("rl", run.trainer.model, watch, progress.curve, plan, checkpoints, output)
    return {
        **_metrics(run, plan, watch, progress, rollout, seconds),
        "rl_method": rl.method,
        "prompts": len(prompts),
        "validation_prompts": len(validation),
        "rewards": ", ".join(f"{one.name} × {one.weight:g}" for one in rewards),
        "reference_difference": difference,
    }


def _require_steps(prompts: Sequence[Prompt], rl: RlSettings) -> None:
    if len(prompts) < rl.prompts_in_a_step:
        raise ConfigError(
            where="rl.effective_batch",
            found=f"{rl.effective_batch} answers, {rl.n} to each of {rl.prompts_in_a_step} "
            f"prompts, and there are {len(prompts)} prompts",
            expected="at least one step of whole groups",
            fix=f"set rl.effective_batch: {len(prompts) * rl.n}, or add training rows"
            if prompts
            else "add rows of the task to data.train, or remove the section rl",
        )


def _adapter_method(sft_adapter: Path, lora: LoraSettings) -> LoraSettings:
    """Return `lora` with the method of the SFT adapter. Raises ConfigError for one without RL."""
    lora = resolve_method(sft_adapter, lora)
    reason = ""
    if is_full(sft_adapter):
        reason = "full: the reference would be a second copy of all weights"
    elif lora.method == "qlora" and not torch.cuda.is_available():
        reason = "qlora without a GPU, where sampling would spoil the NF4 weights"
    if reason:
        raise ConfigError(
            where="lora.method",
            found=reason,
            expected="an adapter that RL can train",
            fix="set lora.method: lora, or remove the section rl",
        )
    return lora


def _options(rl: RlSettings, checkpoints: Path, micro_batch: int) -> dict[str, Any]:
    rl = rl.model_copy(update={"micro_batch": micro_batch})
    options = trainer_options(rl, "rl", checkpoints, KINDS[rl.method][0])
    return {
        "beta": rl.beta,
        "num_generations": rl.n,
        "temperature": rl.temperature,
        "reward_weights": None,
        "steps_per_generation": options["gradient_accumulation_steps"],
        **options,
    }


@dataclass(frozen=True)
class _Policy:
    """The loaded policy, and everything that makes a trainer of it. `sft`: its weights now."""

    model: Any
    sft: dict[str, torch.Tensor]
    rl: RlSettings
    prompts: Sequence[Prompt]
    rewards: Sequence[Reward]
    rollout: Rollout
    checkpoints: Path

    @classmethod
    def load(
        cls,
        snapshot: Path,
        sft_adapter: Path,
        lora: LoraSettings,
        rl: RlSettings,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        rollout: Rollout,
        checkpoints: Path,
    ) -> "_Policy":
        """Load the SFT policy."""
        model = trained_adapter(snapshot, lora, sft_adapter)
        sft = {
            name: weight.detach().float().clone()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
        return cls(model, sft, rl, prompts, rewards, rollout, checkpoints)

    def new_trainer(self, micro_batch: int) -> Any:
        """Make a trainer. Raises ConfigError for options that TRL refuses."""
        config, trainer = KINDS[self.rl.method]
        options = _options(self.rl, self.checkpoints, micro_batch)
        options["reward_weights"] = [reward.weight for reward in self.rewards]
        options["max_completion_length"] = self.rollout.max_new_tokens
        with trl_errors_as_config_errors("rl"):
            return trainer(
                model=self.model,
                args=config(**options),
                prompts=self.prompts,
                rewards=self.rewards,
                rollout=self.rollout,
                sft=self.sft,
            )


def _prove_reference(trainer: Any, prompts: Sequence[Prompt], report: Report) -> float:
    """Prove that the policy is the reference before the first step.

    Returns the largest |policy - reference| of an answer's log-probability in nats, of the first
    prompts with their reference answers. Both compute in the same batches, so rounding is the same:
    the difference is 0, and so is the KL divergence. Raises TrainingError if it is not.
    """
    largest = 0.0
    for prompt in prompts[:PROVEN]:
        ids = torch.tensor([prompt.ids + prompt.reference_ids], device=trainer.accelerator.device)
        labels = ids.clone()
        labels[:, : len(prompt.ids)] = -100
        fed = {"input_ids": ids, "labels": labels}
        with torch.no_grad(), trainer.accelerator.autocast():
            policy = fused_head(trainer.model, **fed).log_probs.sum()
            with as_reference(trainer.model):
                reference = fused_head(trainer.model, **fed).log_probs.sum()
        largest = max(largest, float((policy - reference).abs()))
    if not largest <= TOLERANCE:
        raise TrainingError(
            where="rl: reference",
            found=f"policy and reference differ by {largest:.4f} nats before the first step",
            expected="0: the SFT policy is the reference",
            fix="this is a bug in ft_assets, not in your data: please report it",
        )
    report("reference proven", prompts=len(prompts[:PROVEN]), reference_difference=largest)
    return largest


@dataclass
class _Measure:
    """Measures the greedy answers to the validation prompts.

    validation_loss is the mean reward with its sign changed, so that a lower one is better. An
    answer that does not stop is rewarded as in training; the means of the metrics are unchanged.
    """

    rollout: Rollout
    prompts: Sequence[Prompt]
    rewards: Sequence[Reward]
    watched: Sequence[Reward]
    trainer: Any = None

    def __call__(self, model: Any) -> dict[str, float]:
        sampled = self.rollout.answers(self.trainer, [prompt.ids for prompt in self.prompts])
        answers = [
            Given(prompt.id, answer.text, answer.stopped)
            for prompt, answer in zip(self.prompts, sampled, strict=True)
        ]
        scores = {one.name: one.score(answers) for one in (*self.rewards, *self.watched)}
        reward = sum(
            one.weight * statistics.fmean(one.punished(answers, scores[one.name]))
            for one in self.rewards
        )
        return {
            "validation_loss": -reward,
            "validation_reward": reward,
            **{f"validation_{name}": statistics.fmean(its) for name, its in scores.items()},
            "validation_stop_rate": statistics.fmean(float(one.stopped) for one in sampled),
            "validation_tokens": statistics.fmean(len(one.ids) for one in sampled),
        }


def _metrics(
    run: Run, plan: Plan, watch: Validation, progress: Progress, rollout: Rollout, seconds: float
) -> CurveMetrics:
    first, last = progress.curve[0], progress.curve[-1]
    found: CurveMetrics = {
        "steps": run.trainer.state.global_step,
        "seconds": round(seconds, 1),
        **progress.speed(),
        "sampled_tokens": rollout.tokens,
        "reward_first": first["reward"],
        "reward_last": last["reward"],
        "kl_first": first["kl"],
        "kl_last": last["kl"],
        "loss_first": first["loss"],
        "loss_last": last["loss"],
        **watch.metrics(),
        "peak_train_memory_gb": round(device_memory_gb(), 3),
        **plan.metrics(),
        **memory_error(plan),
        **run.metrics,
    }
    if rollout.tokens:
        found["sampled_tokens_per_s"] = round(rollout.tokens / rollout.seconds, 1)
        found["sampling_share"] = round(rollout.seconds / seconds, 3)
    return found
