"""The Typer app, and what several commands need."""

import logging
import os
import warnings
from typing import Any

import typer

from ft_assets.config import Project, find_config, load_project
from ft_assets.errors import FtError, nearest

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune, prove, merge: the asset graph from a terminal.",
)


def select(defs: Any, text: str, until: str | None = None) -> list[Any]:
    """Return the keys of a selection: assets, or Dagster's selection syntax, by commas.

    `until`: in place of it, assets by commas, each with everything above it. Raises FtError with
    the nearest name.
    """
    import dagster as dg

    graph = defs.resolve_asset_graph()
    made = {key.to_user_string() for key in graph.materializable_asset_keys}
    if until is not None and text != "*":
        raise FtError(
            where="--asset and --until",
            found="are both given",
            expected="one of them",
            fix="--until X makes X and what it needs; for a part of that, use --asset alone",
        )
    option, given = ("--asset", text) if until is None else ("--until", until)
    keys = set()
    for part in map(str.strip, given.split(",")):
        if until is not None and part not in made:
            raise _unknown(f"--until {part}", "is not an asset that is made", part, made)
        try:
            selection = part if until is None else f'+key:"{part}"'
            keys |= dg.AssetSelection.from_string(selection).resolve(graph)
        except Exception as error:  # Dagster's own parse errors have no common class
            raise _unknown(f"--asset {part}", str(error).splitlines()[0], part, made) from None
    chosen = [key for key in keys if key in graph.materializable_asset_keys]
    if not chosen:  # Dagster takes an empty selection for the whole graph
        names = ", ".join(sorted(key.to_user_string() for key in keys)) or "nothing"
        found = f"selects {names}: there is nothing to make"
        raise _unknown(f"{option} {given}", found, given, made)
    return chosen


def _unknown(where: str, found: str, word: str, made: set[str]) -> FtError:
    return FtError(
        where=where,
        found=found,
        expected="an asset, or a selection of assets, by commas",
        fix=f"{nearest(word.strip('+'), made, 'choose one')} (assets: {', '.join(sorted(made))})",
    )


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
