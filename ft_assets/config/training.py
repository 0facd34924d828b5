"""`lora:`, `sft:` and `dpo:` of finetune.yaml. Option names are TRL's and PEFT's own where they have one."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ft_assets.config.section import Section
from ft_assets.errors import nearest

# TRL 1.16's DPOTrainer; a test compares them with what it takes.
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# Names by which other ways to learn from preferences are known: each is a trainer of its own, or was a loss of one.
OTHER_TRAINERS = {
    "kto": "KTO, another trainer", "kto_pair": "KTO, another trainer", "orpo": "ORPO, another trainer", "cpo": "CPO, another trainer",
    "simpo": "SimPO, a loss of the CPO trainer", "bco": "BCO, another trainer", "grpo": "GRPO, another trainer", "ppo": "PPO, another trainer",
    "rloo": "RLOO, another trainer",
}  # fmt: skip
# lora.target_modules by name: the linear layers of a decoder layer that get an adapter.
TARGETS = {
    "attention-qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
ALL_LINEAR = "all-linear"  # PEFT knows the name too, and finds linear layers of any name
REPORT_TO = ("tensorboard", "wandb", "mlflow", "trackio")
# What decides when and where something is written, and nothing of what is trained: no part of a fingerprint.
ASIDE = {"save_steps", "report_to"}


class LoraSettings(Section):
    method: Literal["auto", "lora", "qlora", "full"] = Field(
        default="auto",
        description="auto: lora where the 16-bit base fits with room, else qlora (NF4); always lora on a CPU. "
        "full: all weights are trained; the rest of lora: is unused.",
    )
    r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: str | list[str] = Field(
        default="attention",
        description=f"The layers that get an adapter: {', '.join(TARGETS)}, or a list of names.",
    )
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] = Field(
        default=[],
        description="Modules that are trained whole beside the adapter, e.g. embed_tokens.",
    )
    trainable_token_indices: list[str] = Field(
        default=[], description="Tokens whose embeddings are trained, by their text."
    )

    @model_validator(mode="after")
    def _adapter_only(self) -> "LoraSettings":
        if self.method == "full":
            given = [
                name
                for name in ("use_rslora", "use_dora", "modules_to_save", "trainable_token_indices")
                if getattr(self, name)
            ]
            if given:
                raise ValueError(
                    f"method full trains all weights; {', '.join(given)} only has a meaning with an adapter"
                )
        return self

    @field_validator("target_modules")
    @classmethod
    def _known_targets(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str) and value not in TARGETS:
            known = f"use one of {', '.join(TARGETS)}, or a list of module names"
            raise ValueError(f"{value!r} is not a known preset; {nearest(value, TARGETS, known)}")
        if any(name.rsplit(".", 1)[-1] == "lm_head" for name in value if isinstance(value, list)):
            raise ValueError(
                "an adapter on lm_head would never be trained: TRL computes the loss from lm_head's own weight; remove it from the list"
            )
        return value


class EarlyStopping(Section):
    """Stop when the validation loss has not fallen by `min_delta` in `patience` measurements (SFT: nats a token; DPO: its loss)."""

    patience: int = Field(default=2, ge=1)
    min_delta: float = Field(default=0.0, ge=0)


class TrainSettings(Section):
    num_train_epochs: float = Field(default=2, gt=0)
    max_steps: int = Field(default=-1, description="Optimizer steps; -1: by epochs.")
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = Field(default=0.03, ge=0, description="Below 1 a share of all steps.")
    effective_batch: int = Field(
        default=16, ge=1, description="Conversations (or pairs) an optimizer step."
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Of these, how many at once; the rest is accumulated. None: as the memory plan allows.",
    )
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="None: on a GPU for the layers that need it by the memory plan, off on a CPU.",
    )
    save_steps: int = Field(default=50, ge=1, description="Optimizer steps between checkpoints.")
    max_loss_rise: float | None = Field(
        default=3.0,
        gt=0,
        description="Stop if the mean of 10 steps is this far above the lowest one before; null: never.",
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="Steps between validation losses; None: after each epoch."
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description="Which weights: of the lowest validation loss, or of the last step.",
    )
    early_stopping: EarlyStopping | None = None
    seed: int = 42
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=[], description="Trackers; they take their keys from the environment."
    )
    trainer: dict[str, Any] = Field(
        default={}, description="Any other option of TRL's config, by its own name."
    )

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide what is trained, as plain data."""
        return self.model_dump(mode="json", exclude=ASIDE)


class SftSettings(TrainSettings):
    packing: bool | Literal["auto"] = Field(
        default="auto",
        description="Conversations of a micro-batch in one row without padding, each on its own. auto: where it pays.",
    )


class DpoSettings(TrainSettings):
    num_train_epochs: float = Field(default=1, gt=0)
    learning_rate: float = Field(default=5e-6, gt=0)
    effective_batch: int = Field(default=8, ge=1)
    beta: float = Field(default=0.1, gt=0)
    loss_type: str | list[str] = "sigmoid"
    max_pairs: int | None = Field(
        default=None, ge=1, description="Use only the first n pairs by id (a time budget)."
    )
    share_prompts: bool = Field(
        default=True,
        description="Compute the prompt of a pair once; off: as TRL does, for each answer.",
    )

    @field_validator("loss_type")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        known = ", ".join(DPO_LOSSES)
        for name in [value] if isinstance(value, str) else value:
            if name in OTHER_TRAINERS:
                raise ValueError(
                    f"{name!r} is not a loss of DPO but {OTHER_TRAINERS[name]}, which is no step of this graph; dpo has {known}"
                )
            if name not in DPO_LOSSES:
                raise ValueError(
                    f"{name!r} is no loss of TRL's; {nearest(name, DPO_LOSSES, known)}"
                )
        return value

    @model_validator(mode="after")
    def _smoothed(self) -> "DpoSettings":
        if "exo_pair" in self.loss_type and not self.trainer.get(
            "label_smoothing"
        ):  # a list holds it, or it is the name
            raise ValueError(
                "loss_type exo_pair needs a label_smoothing above 0: set dpo.trainer.label_smoothing, e.g. to 1e-3 as its paper does"
            )
        return self
