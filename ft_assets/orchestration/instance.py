"""The Dagster instance of a project: where it is, what its first settings are, and how it opens."""

import os
from pathlib import Path
from typing import Any

from ft_assets.config import Project
from ft_assets.errors import ConfigError
from ft_assets.system_errors import explained

HOME = "DAGSTER_HOME"
TEMPORARY = ".tmp_dagster_home_"  # the folder of an instance that a command deletes
SETTINGS = (
    "telemetry: {enabled: false}\n"
    "nux: {enabled: false}  # no sign-up dialog over the UI\n"
    "# Pool gpu: one training or evaluation at a time, over all runs. "
    "Two GPUs: dagster instance concurrency set gpu 2\n"
    "concurrency: {pools: {default_limit: 1, granularity: op}}\n"
    "# A run whose process died is marked failed, leaves the pool and is started again, "
    "from its last checkpoint.\n"
    "run_launcher: {module: ft_assets.runs, class: ProcessRunLauncher}\n"
    "run_monitoring: {enabled: true, poll_interval_seconds: 30, "
    "free_slots_after_run_end_seconds: 40}\n"
    "run_retries: {enabled: true, max_retries: 2, retry_on_asset_or_op_failure: false}\n"
)


def home_of(project: Project) -> Path:
    """Return DAGSTER_HOME, by default .ft/dagster beside finetune.yaml."""
    return Path(os.environ.get(HOME) or project.root / ".ft" / "dagster").absolute()


def dagster_home(project: Project) -> Path:
    """Make the folder of the instance, with a dagster.yaml, and set DAGSTER_HOME to it."""
    home = home_of(project)
    home.mkdir(parents=True, exist_ok=True)
    os.environ[HOME] = str(home)
    settings = home / "dagster.yaml"
    if not settings.exists():
        settings.write_text(SETTINGS)
    return home


def open_instance() -> Any:
    """Open the Dagster instance of DAGSTER_HOME. Raises ConfigError for a broken dagster.yaml."""
    import dagster as dg
    import yaml

    try:
        return dg.DagsterInstance.get()
    except (yaml.YAMLError, UnicodeDecodeError, dg.DagsterError) as error:
        if explained(error) is not None:
            raise
        raise ConfigError(
            where=str(Path(os.environ[HOME]) / "dagster.yaml"),
            found=f"is not a file of settings: {' '.join(str(error).split())[:300]}",
            expected="settings of a Dagster instance",
            fix="correct it; or move it away, and ft writes one with its defaults",
        ) from None


def require_kept(instance: Any, project: Project) -> None:
    """Raise ConfigError for an instance that a command of Dagster made for itself and deletes.

    `dagster` and `dg` do so without DAGSTER_HOME: the UI would never show the run. The instance of
    a code location that a project shares is the choice of those who run it.
    """
    if project.place.prefix:
        return
    folder = str(instance.root_directory or "") if instance.is_persistent else ""
    if Path(folder).name.startswith(TEMPORARY):
        home = project.root / ".ft" / "dagster"
        raise ConfigError(
            where=HOME,
            found="is not set, so that this run's history would be deleted with its command",
            expected="the instance of ft run and ft ui",
            fix=f"export {HOME}={home}, or write {HOME}={home} into .env beside finetune.yaml; "
            "then repeat the command",
        )
