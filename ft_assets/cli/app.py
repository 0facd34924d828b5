"""The Typer app, and what several commands need."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import typer

from ft_assets.config import Project, find_config, load_project
from ft_assets.errors import ConfigError, FtError
from ft_assets.system_errors import explained

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune, prove, merge: the asset graph from a terminal.",
)


def dagster_home(project: Project) -> Path:
    """Return DAGSTER_HOME, by default .ft/dagster beside finetune.yaml, with a dagster.yaml."""
    home = Path(os.environ.get("DAGSTER_HOME") or project.root / ".ft" / "dagster").absolute()
    home.mkdir(parents=True, exist_ok=True)
    os.environ["DAGSTER_HOME"] = str(home)
    settings = home / "dagster.yaml"
    if not settings.exists():
        settings.write_text(
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
        file = Path(os.environ["DAGSTER_HOME"]) / "dagster.yaml"
        raise ConfigError(
            where=str(file),
            found=f"is not a file of settings: {' '.join(str(error).split())[:300]}",
            expected="settings of a Dagster instance",
            fix="correct it; or move it away, and ft writes one with its defaults",
        ) from None


def select(defs: Any, text: str) -> list[Any]:
    """Return the keys of a selection: assets, or Dagster's selection syntax, by commas.

    Raises FtError with the names of the assets.
    """
    import dagster as dg

    graph = defs.resolve_asset_graph()
    keys = set()
    for part in text.split(","):
        try:
            keys |= dg.AssetSelection.from_string(part.strip()).resolve(graph)
        except Exception as error:  # Dagster's own parse errors have no common class
            known = ", ".join(
                sorted(key.to_user_string() for key in graph.materializable_asset_keys)
            )
            raise FtError(
                where=f"--asset {part}",
                found=str(error).splitlines()[0],
                expected="assets or selections, by commas",
                fix=f"assets: {known}",
            ) from None
    chosen = [key for key in keys if key in graph.materializable_asset_keys]
    if not chosen:  # Dagster takes an empty selection for the whole graph
        names = ", ".join(sorted(key.to_user_string() for key in keys)) or "nothing"
        known = ", ".join(sorted(key.to_user_string() for key in graph.materializable_asset_keys))
        raise FtError(
            where=f"--asset {text}",
            found=f"selects {names}: there is nothing to make",
            expected="at least one asset that is made",
            fix=f"assets: {known}",
        )
    return chosen


def quiet() -> None:
    """Leave the terminal to our own words."""
    warnings.filterwarnings("ignore")
    logging.getLogger("dagster").setLevel(logging.ERROR)


def graph_project() -> Project:
    """Return the project, and make the code location of child processes read the same file."""
    project = load_project()
    os.environ["FT_CONFIG"] = str(find_config())
    return project


def chosen(project: Project, base: list[str] | None) -> list[str]:
    """Return the given base models, all by default. Raises ConfigError for an unknown one."""
    names = base or list(project.base_models)
    for name in names:
        project.base_model(name)
    return names
