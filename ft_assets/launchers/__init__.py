"""Where a step runs. The graph knows one contract, `Launcher.run(job, on_progress) -> StepResult`; `launcher:` picks who keeps it."""

from ft_assets.launchers.base import Launcher, OnProgress, StepFailed, StepLost
from ft_assets.launchers.choose import make_launcher
from ft_assets.launchers.local import LocalLauncher

__all__ = ["Launcher", "LocalLauncher", "OnProgress", "StepFailed", "StepLost", "make_launcher"]
