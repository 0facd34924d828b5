"""`lora:`, `sft:` and `dpo:` of finetune.yaml. Option names are TRL's and PEFT's own where they have one."""

from typing import Any, Literal

from pydantic import Field

from ft_assets.config.section import Section


class LoraSettings(Section):
    method: Literal["lora", "qlora"] = "lora"
    r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: Literal["attention-qv", "attention", "all-linear"] | list[str] = "attention"
    use_rslora: bool = False
    use_dora: bool = False


class TrainSettings(Section):
    num_train_epochs: float = Field(default=2, gt=0)
    max_steps: int = Field(default=-1, description="Optimizer steps; -1: by epochs.")
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = Field(default=0.03, ge=0, description="Below 1 a share of all steps.")
    effective_batch: int = Field(default=16, ge=1, description="Conversations (or pairs) an optimizer step.")
    micro_batch: int = Field(default=4, ge=1, description="Of these, how many at once; the rest is accumulated.")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool | None = Field(default=None, description="None: on for a GPU, off on a CPU.")
    save_steps: int = Field(default=50, ge=1, description="Optimizer steps between checkpoints.")
    seed: int = 42
    trainer: dict[str, Any] = Field(default={}, description="Any other option of TRL's config, by its own name.")


class SftSettings(TrainSettings):
    pass


class DpoSettings(TrainSettings):
    num_train_epochs: float = Field(default=1, gt=0)
    learning_rate: float = Field(default=5e-6, gt=0)
    effective_batch: int = Field(default=8, ge=1)
    beta: float = Field(default=0.1, gt=0)
    loss_type: str | list[str] = "sigmoid"
    max_pairs: int | None = Field(default=None, ge=1, description="Use only the first n pairs by id (a time budget).")
