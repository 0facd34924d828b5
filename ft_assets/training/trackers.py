"""`report_to`: TensorBoard, W&B, MLflow, Trackio beside the Dagster UI. They read their keys from the environment themselves."""

import importlib.util
import os
import shutil
from pathlib import Path

from ft_assets.errors import ConfigError

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
FOLDER = "tensorboard"


def require_trackers(names: list[str], key: str, checkpoints: Path) -> list[str]:
    """Return `names` for TRL's report_to, and tell TensorBoard to write beside the checkpoints.

    Raises ConfigError with the pip line where a tracker's package is missing.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                where=f"{key}.report_to",
                found=f"{name}: its package is not installed",
                expected="an installed tracker",
                fix=f"pip install {PACKAGES[name]}",
            )
    if "tensorboard" in names:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(checkpoints / FOLDER)
    return names


def keep_events(checkpoints: Path, output: Path) -> None:
    """Copy TensorBoard's events (those of interrupted runs too) into the artifact's `info/`, if there are any."""
    if (checkpoints / FOLDER).is_dir():
        shutil.copytree(checkpoints / FOLDER, output / "info" / FOLDER)
