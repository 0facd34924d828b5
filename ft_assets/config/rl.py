"""`rl:` of finetune.yaml: reinforcement learning from rewards of the model's own answers."""

from typing import Literal

from pydantic import Field, model_validator

from ft_assets.config.training import TrainSettings


class RlSettings(TrainSettings):
    num_train_epochs: float = Field(
        default=1, gt=0, le=10_000, description="Passes over the prompts; max_steps overrides it."
    )
    learning_rate: float = Field(
        default=1e-5, gt=0, le=1, description="Peak learning rate, reached after the warmup."
    )
    effective_batch: int = Field(
        default=32,
        ge=2,
        le=1_000_000,
        description="Answers in an optimizer step: n to each of effective_batch / n prompts.",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Answers trained on at once; the rest of the effective batch is accumulated. "
        "None: the memory plan decides.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="The gradient's norm is clipped to this."
    )
    save_steps: int = Field(default=10, ge=1, description="Optimizer steps between checkpoints.")
    method: Literal["grpo", "rloo"] = Field(
        default="grpo",
        description="grpo: GRPO (Shao et al. 2024), an answer's advantage is in standard "
        "deviations of its group. rloo: RLOO (Ahmadian et al. 2024), against the mean of the "
        "others.",
    )
    n: int = Field(
        default=8, ge=2, le=1000, description="Answers to a prompt, which are compared: a group."
    )
    temperature: float = Field(
        default=1.0, gt=0, le=10, description="The logits are divided by it: higher, more variety."
    )
    beta: float = Field(
        default=0.04,
        gt=0,
        description="Strength of the pull toward the SFT policy: the weight of the KL divergence.",
    )
    rewards: dict[str, float] = Field(
        default={},
        description="Metrics of `evaluation` with their weights, which are added. "
        "Default: {evaluation.metric: 1}.",
    )
    max_prompts: int | None = Field(
        default=None, ge=1, description="Use only the first n train rows by id (a time budget)."
    )

    @model_validator(mode="after")
    def _whole_groups(self) -> "RlSettings":
        if self.effective_batch % self.n:
            raise ValueError(
                f"effective_batch {self.effective_batch} is not a multiple of n {self.n}: a step "
                "has whole groups of answers"
            )
        zero = [name for name, weight in self.rewards.items() if not weight]
        if zero:
            raise ValueError(f"rewards.{zero[0]} has a weight of 0: remove it")
        return self

    @property
    def prompts_in_a_step(self) -> int:
        """The number of prompts whose answers are sampled for a step."""
        return self.effective_batch // self.n
