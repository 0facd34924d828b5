"""Where a step runs. The graph knows one contract, `Launcher.run(job, on_progress) -> StepResult`; `launcher:` picks who keeps it."""

from ft_assets.launchers.base import InfrastructureFault, Launcher, OnProgress, StepFailed
from ft_assets.launchers.choose import make_launcher
from ft_assets.launchers.local import LocalLauncher

__all__ = ["InfrastructureFault", "Launcher", "LocalLauncher", "OnProgress", "StepFailed", "make_launcher"]
