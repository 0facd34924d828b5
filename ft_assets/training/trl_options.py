"""Turn our settings into TRL's options: the shared part of SFT and DPO."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import Trainer

from ft_assets.config import TrainSettings
from ft_assets.errors import ConfigError
from ft_assets.hardware import compute_dtype
from ft_assets.training.distributed import accumulation
from ft_assets.training.trackers import require_trackers
from ft_assets.training.trl_refused_options import check_trainer


def trainer_options(
    settings: TrainSettings, key: str, checkpoints: Path, kind: type
) -> dict[str, Any]:
    """Return the keyword arguments of TRL's config class `kind`.

    Raises ConfigError for an option that cannot be set.
    """
    check_trainer(settings, key, {field.name for field in dataclasses.fields(kind)})
    on_gpu = torch.cuda.is_available()
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
        "gradient_checkpointing": False,  # prepare.py enables it for the layers that need it
        "bf16": compute_dtype() == torch.bfloat16,
        "use_cpu": not on_gpu,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show the mean of earlier losses instead of nan
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "report_to": require_trackers(list(settings.report_to), key, checkpoints),
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
    }
    return {**options, **settings.trainer}


def trl_config(kind: Any, options: dict[str, Any], key: str) -> Any:
    """Make TRL's config.

    Raises ConfigError if TRL refuses a value, or if the optimizer's package is missing.
    """
    with trl_errors_as_config_errors(key):
        config = kind(**options)
    try:
        Trainer.get_optimizer_cls_and_kwargs(config)
    except ImportError as error:
        raise _refusal(f"{key}.trainer.optim", error) from None
    except (
        TypeError,
        ValueError,
    ):  # some optimizers need the model: checked again when it is there
        pass
    return config


@contextlib.contextmanager
def trl_errors_as_config_errors(key: str) -> Iterator[None]:
    """Raise ConfigError, with TRL's own words, for options that TRL or transformers refuse."""
    try:
        yield
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise _refusal(f"{key}.trainer", error) from error


def _refusal(where: str, error: Exception) -> ConfigError:
    return ConfigError(
        where=where,
        found=str(error),
        expected="options and values that TRL accepts",
        fix="change or remove the option",
    )


class ReportsTrlErrors:
    """Mixin before a TRL trainer.

    A loader, optimizer or schedule that cannot be made is an error of `<key>.trainer`.
    """

    key = ""

    def get_train_dataloader(self) -> Any:
        with trl_errors_as_config_errors(self.key):
            return super().get_train_dataloader()  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with trl_errors_as_config_errors(self.key):
            return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def create_scheduler(self: Any, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if num_training_steps == 1 and self.args.warmup_steps < 1:
            # A share of one step is rounded up to it, and the rate of a warmup's first step is 0.
            self.args.warmup_steps = 0
        with trl_errors_as_config_errors(self.key):
            create = super().create_scheduler  # type: ignore[misc]
            return create(num_training_steps, *args, **kwargs)
