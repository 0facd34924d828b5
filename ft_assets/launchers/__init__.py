"""Where a step runs: every launcher implements `Launcher.run(job, on_progress) -> StepResult`; `launcher:` selects one."""

from pathlib import Path

from ft_assets.config.launcher import (
    AccelerateSettings,
    AnyLauncher,
    KubernetesSettings,
    RaySettings,
    SlurmSettings,
)
from ft_assets.launchers.base import Launcher, OnProgress, StepFailed, StepLost
from ft_assets.launchers.local import LocalLauncher

__all__ = ["Launcher", "LocalLauncher", "OnProgress", "StepFailed", "StepLost", "make_launcher"]


def make_launcher(settings: AnyLauncher, root: Path = Path()) -> Launcher:
    """Return the launcher that finetune.yaml, which lies in `root`, asks for. Raises ConfigError if its library or tool is not installed."""
    if isinstance(settings, AccelerateSettings):
        from ft_assets.launchers.accelerate import AccelerateLauncher

        return AccelerateLauncher(settings)
    if isinstance(settings, RaySettings):
        from ft_assets.launchers.ray import RayLauncher

        return RayLauncher(settings)
    if isinstance(settings, SlurmSettings):
        from ft_assets.launchers.slurm import SlurmLauncher

        return SlurmLauncher(settings)
    if isinstance(settings, KubernetesSettings):
        from ft_assets.launchers.kubernetes import KubernetesLauncher

        return KubernetesLauncher(settings, root)
    return LocalLauncher()
