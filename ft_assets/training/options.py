"""Turn our settings into TRL's options: the shared part of SFT and DPO."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ft_assets.config import TrainSettings
from ft_assets.errors import ConfigError, nearest
from ft_assets.models.loading import compute_dtype


def accumulation(settings: TrainSettings, key: str) -> int:
    """Return gradient accumulation steps. Raises ConfigError unless effective_batch is a multiple of micro_batch."""
    if settings.effective_batch % settings.micro_batch:
        raise ConfigError(
            f"{key}.effective_batch",
            str(settings.effective_batch),
            f"a multiple of {key}.micro_batch ({settings.micro_batch})",
            "change one of them",
        )
    return settings.effective_batch // settings.micro_batch


def trainer_options(settings: TrainSettings, key: str, checkpoints: Path, kind: type) -> dict[str, Any]:
    """Return keyword arguments of TRL's config class `kind`. Raises ConfigError for an option it does not know."""
    known = {field.name for field in dataclasses.fields(kind)}
    for name in settings.trainer:
        if name not in known:
            raise ConfigError(
                f"{key}.trainer.{name}",
                f"is not an option of {kind.__name__}",
                "TRL's own name",
                nearest(name, sorted(known), "see TRL's documentation"),
            )
    on_gpu = torch.cuda.is_available()
    checkpointing = settings.gradient_checkpointing if settings.gradient_checkpointing is not None else on_gpu
    options: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": accumulation(settings, key),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": checkpointing,
        "bf16": compute_dtype() == torch.bfloat16,
        "use_cpu": not on_gpu,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
    }
    return {**options, **settings.trainer}
