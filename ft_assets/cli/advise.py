"""Command `ft advise`: whether to fine-tune at all, before a training."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ft_assets.cli.app import app, chosen, graph_project, quiet, select
from ft_assets.config import AdviseSettings, Project
from ft_assets.orchestration.instance import dagster_home, open_instance
from ft_assets.screen import INTERRUPTED

if TYPE_CHECKING:
    import dagster as dg

NAME = "advice"


@app.command()
def advise(
    base: Annotated[
        list[str] | None, typer.Option("--base", help="Base model; all by default.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print an object: the advice by base model.")
    ] = False,
) -> None:
    """Advise to prompt, retrieve, add rows, or fine-tune, by a sample of train rows.

    It makes the data assets and the base model first. No held-out row is asked.
    """
    project = graph_project()
    names = chosen(project, base)
    dagster_home(project)
    quiet()
    from ft_assets.artifacts import open_store
    from ft_assets.assets.advice import read_advice
    from ft_assets.definitions import build
    from ft_assets.evaluation.advice import text_of
    from ft_assets.orchestration.run_plan import REUSED, Plans

    if project.advise is None:  # finetune.yaml need not have the section for this command
        project = project.model_copy(update={"advise": AdviseSettings()})
    definitions, store = build(project), open_store(project)
    keys, plans = select(definitions, "*", NAME), Plans(project, build)
    found = {}
    for name in names:
        if any(step.action != REUSED or step.why for step in plans.of(keys, name)):
            _make(project, definitions, keys, name)
        found[name] = read_advice(store.verified(store.need(NAME, name)))
    if as_json:
        print(json.dumps({name: one.to_dict() for name, one in found.items()}, indent=1))
    else:
        print("\n\n".join(f"# {name}\n\n{text_of(one)}" for name, one in found.items()))


def _make(
    project: Project, definitions: "dg.Definitions", keys: list["dg.AssetKey"], name: str
) -> None:
    """Make the advice of a base model, and what it needs, in this process."""
    from ft_assets.compat.dagster import shield_log_readers
    from ft_assets.orchestration.console import failures
    from ft_assets.orchestration.data_sources import report_sources
    from ft_assets.runs.in_process import end_dead_runs, execute

    shield_log_readers()
    instance = open_instance()
    end_dead_runs(instance)
    report_sources(instance, project)
    print(f"\n{name}", file=sys.stderr)
    outcome = execute(definitions.resolve_implicit_global_asset_job_def(), instance, keys, name)
    if outcome is None:
        raise typer.Exit(INTERRUPTED)
    if not outcome.success:
        print("\n".join(["", *failures(outcome.all_events)]), file=sys.stderr)
        raise typer.Exit(1)
