"""`report_to`: TensorBoard, W&B, MLflow and Trackio beside the Dagster UI.

The trackers read their keys from the environment.
"""

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
    """Return `names` for TRL's report_to, and let TensorBoard write beside the checkpoints.

    Raises ConfigError with the pip line if a tracker's package is missing.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                where=f"{key}.report_to",
                found=f"{name}: its package is not installed",
                expected="trackers whose package is installed",
                fix=f"pip install {PACKAGES[name]}",
            )
    if "tensorboard" in names:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(checkpoints / FOLDER)
    return names


def keep_events(checkpoints: Path, output: Path) -> None:
    """Copy TensorBoard's events, if there are any, into the artifact's `info/`.

    They include the events of interrupted runs.
    """
    if (checkpoints / FOLDER).is_dir():
        shutil.copytree(checkpoints / FOLDER, output / "info" / FOLDER)
