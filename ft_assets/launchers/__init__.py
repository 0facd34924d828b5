"""Where a step runs. Each launcher implements `Launcher.run`; `launcher:` selects one."""

import pkgutil
from pathlib import Path

from ft_assets.config.launcher import LauncherSettings
from ft_assets.launchers.base import Launcher, OnProgress
from ft_assets.launchers.local import LocalLauncher

__all__ = ["Launcher", "LocalLauncher", "OnProgress", "make_launcher"]


def make_launcher(settings: LauncherSettings, root: Path = Path()) -> Launcher:
    """Return the launcher of these settings; `root` is the folder of finetune.yaml.

    Raises ConfigError if its library or tool is not installed.
    """
    return pkgutil.resolve_name(settings.implementation)(settings, root)
