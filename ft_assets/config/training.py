"""`lora:`, `text:`, `sft:` and `dpo:` of finetune.yaml.

An option of TRL or PEFT has its own name here.
"""

from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ft_assets.config.section import Section
from ft_assets.errors import nearest

# The losses of TRL 1.16's DPOTrainer; a test compares them with its code.
DPO_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
# Names of other preference methods: each is a trainer of its own, or was a loss of one.
OTHER_TRAINERS = {
    "orpo": "ORPO, another trainer",
    "cpo": "CPO, another trainer",
    "simpo": "SimPO, a loss of the CPO trainer",
    "bco": "BCO, another trainer",
    "grpo": "GRPO, another trainer",
    "ppo": "PPO, another trainer",
    "rloo": "RLOO, another trainer",
}
# lora.target_modules by name: the linear layers of a decoder layer that get an adapter.
TARGETS = {
    "attention-qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
ALL_LINEAR = "all-linear"  # PEFT knows the name too, and finds linear layers of any name
# Options that decide when and where something is written. They do not change what is trained, so
# they are not part of a fingerprint.
ASIDE = {"save_steps", "report_to"}


class LoraSettings(Section):
    method: Literal["auto", "lora", "qlora", "full"] = Field(
        default="auto",
        description="auto: lora if the 16-bit base fits with room to spare, else qlora (NF4); "
        "always lora on a CPU. full: train all weights and ignore the other options of lora:.",
    )
    base_compute: Literal["bf16", "fp8", "auto"] = Field(
        default="bf16",
        description="Products with the frozen base in SFT. fp8: faster, on an Ada, Hopper or newer "
        "GPU, and only if a probe on your rows agrees with bf16; else refused. auto: fp8 where it "
        "passes, else bf16.",
    )
    r: int = Field(
        default=16, ge=1, le=16_384, description="Rank of the adapter's matrices A and B."
    )
    lora_alpha: float = Field(
        default=32,
        gt=0,
        le=10**6,
        description="The adapter's output is scaled by lora_alpha / r (use_rslora: / sqrt(r)).",
    )
    lora_dropout: float = Field(
        default=0.05, ge=0, lt=1, description="Dropout of the adapter's input during training."
    )
    target_modules: str | list[str] = Field(
        default="attention",
        description=f"The layers that get an adapter: {', '.join(TARGETS)}, or a list of names.",
    )
    use_rslora: bool = Field(
        default=False,
        description="Scale by lora_alpha / sqrt(r): rank-stabilized LoRA, for high ranks.",
    )
    use_dora: bool = Field(
        default=False,
        description="DoRA: also train the magnitude of each weight row; slower, more memory.",
    )
    modules_to_save: list[str] = Field(
        default=[],
        description="Modules that are fully trained beside the adapter, e.g. embed_tokens.",
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
                    f"method full trains all weights; {', '.join(given)} only has a meaning with "
                    "an adapter"
                )
        return self

    @model_validator(mode="after")
    def _fp8_has_a_frozen_base(self) -> "LoraSettings":
        if self.base_compute == "fp8" and (self.method == "full" or self.use_dora):
            why = (
                "use_dora, whose norms need the 16-bit weights"
                if self.use_dora
                else "method full, which trains the base"
            )
            raise ValueError(f"base_compute fp8 does not go with {why}; remove base_compute")
        return self

    @model_serializer(mode="wrap")
    def _without_the_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit base_compute: bf16, so that fingerprints from before the key stay."""
        data = handler(self)
        if self.base_compute == "bf16":
            data.pop("base_compute", None)
        return data

    @field_validator("target_modules")
    @classmethod
    def _known_targets(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str) and value not in TARGETS:
            known = f"use one of {', '.join(TARGETS)}, or a list of module names"
            raise ValueError(f"{value!r} is not a known preset; {nearest(value, TARGETS, known)}")
        if any(name.rsplit(".", 1)[-1] == "lm_head" for name in value if isinstance(value, list)):
            raise ValueError(
                "an adapter on lm_head would never be trained: TRL computes the loss from "
                "lm_head's own weight; remove it from the list"
            )
        return value


class EarlyStopping(Section):
    """Stop when the validation loss has not fallen by `min_delta` in `patience` measurements."""

    patience: int = Field(
        default=2, ge=1, description="Measurements without improvement before training stops."
    )
    min_delta: float = Field(
        default=0.0,
        ge=0,
        description="Smallest fall of the loss that counts (SFT: nats per token; DPO: its loss).",
    )


class TrainSettings(Section):
    num_train_epochs: float = Field(
        default=2,
        gt=0,
        le=10_000,
        description="Passes over the training data; max_steps overrides it.",
    )
    max_steps: int = Field(
        default=-1,
        ge=-1,
        le=10**9,
        description="Optimizer steps; -1: as many as num_train_epochs takes.",
    )
    learning_rate: float = Field(
        default=2e-4, gt=0, le=1, description="Peak learning rate, reached after the warmup."
    )
    lr_scheduler_type: str = Field(
        default="cosine", description="Schedule after the warmup, by transformers' name."
    )
    warmup_steps: float = Field(
        default=0.03,
        ge=0,
        le=10**9,
        description="Steps of linear warmup; below 1: a share of all steps.",
    )
    effective_batch: int = Field(
        default=16, ge=1, le=1_000_000, description="Conversations (or pairs) in an optimizer step."
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Conversations (or pairs) computed at once; the rest of the effective "
        "batch is accumulated. None: the memory plan decides.",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="The gradient's norm is clipped to this."
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Activation checkpointing. None: on a GPU for as many layers as the memory "
        "plan requires, off on a CPU.",
    )
    save_steps: int = Field(default=50, ge=1, description="Optimizer steps between checkpoints.")
    max_loss_rise: float | None = Field(
        default=3.0,
        gt=0,
        description="Stop if the mean loss of 10 steps is this far above the lowest earlier mean; "
        "null: never.",
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between measurements of the validation loss; None: after each epoch.",
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description="Published weights: of the lowest validation loss, or of the last step.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="Stop when the validation loss no longer falls; None: never."
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**32,
        description="Seed of the adapter's weights, the row order and dropout.",
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=[],
        description="Trackers beside the Dagster UI; they read their keys from the environment.",
    )
    trainer: dict[str, Any] = Field(
        default={}, description="Any other option of TRL's config, by its own name."
    )

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide what is trained, as JSON data for the fingerprint."""
        return self.model_dump(mode="json", exclude=ASIDE)


class SftSettings(TrainSettings):
    KEY: ClassVar = "sft"

    packing: bool | Literal["auto"] = Field(
        default="auto",
        description="Put the conversations of a micro-batch into one row without padding; each "
        "attends only to itself. auto: where it is faster.",
    )


class SamplingSettings(Section):
    """How `sampled_preferences` samples the SFT model and makes pairs of its answers."""

    n: int = Field(default=4, ge=1, le=1000, description="Answers to each prompt.")
    temperature: float = Field(
        default=0.8, gt=0, le=10, description="The logits are divided by it: higher, more variety."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Sample from the likeliest tokens that have this probability together.",
    )
    accept: float | None = Field(
        default=None,
        description="Score of evaluation.metric from which an answer is right. None: the score of "
        "the reference itself.",
    )
    margin: float = Field(
        default=0.0,
        ge=0,
        description="No pair unless the scores of its answers differ by more than this.",
    )
    max_prompts: int | None = Field(
        default=None, ge=1, description="Sample only the first n train rows by id (a time budget)."
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of the samples.")


class TextSettings(SftSettings):
    KEY: ClassVar = "text"

    num_train_epochs: float = Field(
        default=1, gt=0, le=10_000, description="Passes over the documents; max_steps overrides it."
    )
    effective_batch: int = Field(
        default=16, ge=1, le=1_000_000, description="Pieces of documents in an optimizer step."
    )
    embedding_learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate of embeddings and head, where lora: trains them; None: "
        "learning_rate.",
    )


class DpoSettings(TrainSettings):
    num_train_epochs: float = Field(
        default=1, gt=0, le=10_000, description="Passes over the pairs; max_steps overrides it."
    )
    learning_rate: float = Field(
        default=5e-6, gt=0, le=1, description="Peak learning rate, reached after the warmup."
    )
    effective_batch: int = Field(
        default=8, ge=1, le=1_000_000, description="Pairs in an optimizer step."
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the pull toward the SFT policy (Rafailov et al. 2023, eq. 7).",
    )
    loss_type: str | list[str] = Field(
        default="sigmoid", description="TRL's loss, or a list of losses that are added."
    )
    sft_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the chosen answer's mean cross-entropy beside loss_type, against a "
        "fall of its likelihood (Pang et al. 2024, eq. 1); 0: none.",
    )
    max_pairs: int | None = Field(
        default=None,
        ge=1,
        description="Use only the first n pairs or labelled answers by id (a time budget).",
    )
    method: Literal["auto", "dpo", "kto"] = Field(
        default="auto",
        description="auto: DPO if there are pairs, else KTO (Ethayarajh et al. 2024) on labelled "
        "answers. kto: on labelled answers and both answers of each pair.",
    )
    share_prompts: bool = Field(
        default=True,
        description="Compute the prompt of a pair once. False: for each answer, as TRL does.",
    )
    pairs: Literal["given", "sampled", "both"] = Field(
        default="given",
        description="given: of data.preferences. sampled: of the SFT model's own answers to the "
        "train prompts. both: all of them.",
    )
    sampling: SamplingSettings = Field(
        default=SamplingSettings(), description="How own answers are sampled and become pairs."
    )

    @property
    def samples(self) -> bool:
        """Whether pairs of the SFT model's own answers are trained on."""
        return self.pairs != "given"

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide what is trained. Under `auto` the rows decide.

        Not `pairs` and `sampling`: the versions of the pairs have them.
        """
        values = super().decisive()
        if self.method == "auto":
            del values["method"]
        return {key: value for key, value in values.items() if key not in ("pairs", "sampling")}

    @model_serializer(mode="wrap")
    def _without_the_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit later keys at their defaults: fingerprints from before the keys stay."""
        data = handler(self)
        for key in ("pairs", "sampling", "sft_weight"):
            if getattr(self, key) == type(self).model_fields[key].default:
                data.pop(key, None)
        return data

    @field_validator("loss_type")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        known = ", ".join(DPO_LOSSES)
        for name in [value] if isinstance(value, str) else value:
            if name in ("kto", "kto_pair"):
                raise ValueError(f"{name!r} is a method and no loss of DPO: set dpo.method: kto")
            if name in OTHER_TRAINERS:
                raise ValueError(
                    f"{name!r} is not a loss of DPO but {OTHER_TRAINERS[name]}, which this graph "
                    f"does not have; dpo has {known}"
                )
            if name not in DPO_LOSSES:
                raise ValueError(
                    f"{name!r} is not a loss of TRL's DPO; {nearest(name, DPO_LOSSES, known)}"
                )
        return value

    @model_validator(mode="after")
    def _loss_of_the_method(self) -> "DpoSettings":
        if self.method == "kto" and self.loss_type != "sigmoid":
            raise ValueError("loss_type is of pairs, and method kto has a loss of its own: drop it")
        if self.method == "kto" and self.sft_weight:
            raise ValueError(
                "sft_weight is of pairs, and method kto has a loss of its own: drop it"
            )
        if self.sft_weight and "sft" in self.loss_type:
            raise ValueError("loss_type has sft, which sft_weight adds: drop one of the two")
        return self

    @model_validator(mode="after")
    def _sampled_pairs_have_a_use(self) -> "DpoSettings":
        if self.samples and self.method == "kto":
            raise ValueError(
                f"pairs: {self.pairs} makes pairs for DPO, and method kto trains on labels: drop "
                "one of the two"
            )
        return self

    @model_validator(mode="after")
    def _smoothed(self) -> "DpoSettings":
        # loss_type is a list with the name, or the name.
        if "exo_pair" in self.loss_type and not self.trainer.get("label_smoothing"):
            raise ValueError(
                "loss_type exo_pair needs a label_smoothing above 0: set "
                "dpo.trainer.label_smoothing, e.g. to 1e-3 as its paper does"
            )
        return self
