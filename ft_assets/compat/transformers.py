"""Hooks into private parts of transformers; pyproject.toml bounds it at its next minor version.

A trainer in training/ that overrides an underscore method lists it in OVERRIDDEN. The test of
this module compares the list with the trainers and with transformers.
"""

from pathlib import Path
from typing import Any

# The methods of transformers' Trainer that our trainers override, and the parameters they must
# accept. TRL's trainers override `_save_checkpoint` too, with the same parameters.
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_get_train_sampler": ("train_dataset",),
    "_move_model_to_device": ("model", "device"),
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
}


def prepare_inputs(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a collated batch on the trainer's device."""
    return trainer._prepare_inputs(batch)


def save_checkpoint(trainer: Any) -> None:
    """Write a checkpoint of the trainer's current step."""
    trainer._save_checkpoint(trainer.model, None)


def load_checkpoint_weights(trainer: Any, checkpoint: Path) -> None:
    """Load a checkpoint's weights into the trainer's model, without optimizer and schedule."""
    trainer._load_from_checkpoint(str(checkpoint))


def forget_source_path(model: Any) -> None:
    """Remove the path that the model was loaded from out of its config."""
    model.config._name_or_path = ""
