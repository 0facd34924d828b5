"""Heavy steps on a Ray cluster. The driver is a child process here, so that it streams, fails and is stopped as any step.

Ray ends everything of a job whose driver ends: a cancelled or killed run leaves nobody training.
"""

import importlib.util
import sys
from pathlib import Path

from ft_assets.config.launcher import RaySettings
from ft_assets.errors import ConfigError
from ft_assets.job import Job
from ft_assets.launchers.base import HEAVY_STEPS
from ft_assets.launchers.local import LocalLauncher


class RayLauncher(LocalLauncher):
    """Training steps run as `workers` ranks of Ray Train, evaluation, merge, release and export as one; the light steps stay here."""

    def __init__(self, settings: RaySettings) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                where="launcher: ray",
                found="ray is not installed",
                expected="the extra `ray`",
                fix='pip install "ft_assets[ray]"',
            )
        self.settings = settings

    def command(self, job_file: Path, job: Job) -> list[str]:
        if job.step not in HEAVY_STEPS:
            return super().command(job_file, job)
        return [
            sys.executable,
            "-m",
            "ft_assets.launchers.ray_driver",
            str(job_file),
            self.settings.model_dump_json(),
        ]
