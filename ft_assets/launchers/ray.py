"""Heavy steps on a Ray cluster, driven by a child process of this machine.

The driver streams, fails and stops like any step. Ray ends all workers of a job whose driver ends,
so a cancelled or killed run leaves no training behind.
"""

import importlib.util
import sys
from pathlib import Path

from ft_assets.config.launcher import RaySettings
from ft_assets.errors import ConfigError
from ft_assets.job import Job
from ft_assets.launchers.local import LocalLauncher


class RayLauncher(LocalLauncher):
    """Runs a training step as `workers` ranks of Ray Train, and other heavy steps as one.

    Light steps run on this machine.
    """

    def __init__(self, settings: RaySettings, root: Path = Path()) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                where="launcher: ray",
                found="ray is not installed",
                expected="the extra `ray`",
                fix='pip install "ft_assets[ray]"',
            )
        self.settings = settings

    def command(self, job_file: Path, job: Job) -> list[str]:
        if not job.gpu:
            return super().command(job_file, job)
        driver = [sys.executable, "-m", "ft_assets.launchers.ray_driver"]
        return [*driver, str(job_file), self.settings.model_dump_json()]
