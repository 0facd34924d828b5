"""`ft doctor`, the launcher: whether what it needs is installed, and whether its cluster answers. Submits nothing."""

from pathlib import Path

from ft_assets.commands.checkup import Check, fail, ok
from ft_assets.config.launcher import AnyLauncher
from ft_assets.launchers import make_launcher
from ft_assets.launchers.cluster import ClusterLauncher, NoAnswer


def launcher_check(settings: AnyLauncher, root: Path) -> Check:
    """Return what there is to say of `launcher:`. Raises ConfigError for a library, a tool, a partition or a right that is missing."""
    launcher = make_launcher(settings, root)
    if not isinstance(launcher, ClusterLauncher):
        return ok("launcher", settings.kind)
    try:
        return ok("launcher", f"{settings.kind} answers: {launcher.greet()}")
    except NoAnswer as error:
        return fail("launcher", f"{settings.kind} does not answer ({error})", "look at the cluster; runs wait for it and try again")
