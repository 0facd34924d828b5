"""Commands on the graph: run, plan, status, ui."""

import json
import sys
from typing import Annotated

import typer

from ft_assets.cli.app import (
    app,
    chosen,
    graph_project,
    quiet,
    select,
)
from ft_assets.orchestration.instance import dagster_home, open_instance
from ft_assets.screen import INTERRUPTED


@app.command()
def run(
    base: Annotated[
        list[str] | None, typer.Option("--base", help="Base model; all by default.")
    ] = None,
    asset: Annotated[
        str,
        typer.Option(
            "--asset",
            help="Assets or selections by commas, e.g. 'eval_report,merged_model' or "
            "'lora_adapter*' (it and all below it).",
        ),
    ] = "*",
    until: Annotated[
        str | None,
        typer.Option("--until", help="Only this asset and all that it needs, e.g. heldout_split."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print a list of objects, one a base model: what came of it."),
    ] = False,
) -> None:
    """Materialize assets; steps whose inputs did not change are reused."""
    project = graph_project()
    names = chosen(project, base)
    dagster_home(project)
    quiet()
    import dagster as dg

    from ft_assets import definitions
    from ft_assets.artifacts import open_store
    from ft_assets.assets.judged import rivals_first
    from ft_assets.commands.outcome import Outcome, outcome_of
    from ft_assets.commands.status import left_out_counts, left_out_lines
    from ft_assets.compat.dagster import shield_log_readers
    from ft_assets.orchestration.console import failures
    from ft_assets.orchestration.data_sources import report_sources
    from ft_assets.runs.in_process import end_dead_runs, execute

    shield_log_readers()
    instance = open_instance()
    for run_id in end_dead_runs(instance):
        print(
            f"run {run_id[:8]} was killed; a training resumes from its last checkpoint",
            file=sys.stderr,
        )
    report_sources(instance, project)
    defs = definitions.defs()
    job = defs.resolve_implicit_global_asset_job_def()
    keys = select(defs, asset, until)
    partitioned = any(defs.resolve_asset_graph().get(key).is_partitioned for key in keys)
    failed, outcomes = dict[str, list[str]](), list[Outcome]()
    for name in rivals_first(project, names) if partitioned else [None]:
        print(f"\n{name or 'unpartitioned'}", file=sys.stderr)
        outcome = execute(job, instance, keys, name)
        if outcome is None:
            print(
                "\ninterrupted: a training resumes from its last checkpoint at the next ft run",
                file=sys.stderr,
            )
            raise typer.Exit(INTERRUPTED)
        if not outcome.success:
            failed[name or asset] = failures(outcome.all_events)
        outcomes.append(outcome_of(name, outcome))
    board = dg.AssetKey("leaderboard")
    shown = len(names) > 1 or open_store(project).current("leaderboard", None) is not None
    # The leaderboard must list what failed, and a failed run skips it.
    if failed and board in keys and shown:
        job.execute_in_process(
            instance=instance,
            asset_selection=[board],
            raise_on_error=False,
            run_config={"loggers": {"console": {}}},
        )
    for line in left_out_lines(left_out_counts(project, open_store(project), names)):
        print(f"\n{line}", file=sys.stderr)
    if as_json:
        print(json.dumps([outcome.model_dump() for outcome in outcomes], indent=1))
    if failed:
        print(f"\nnot all done: {', '.join(failed)} (make ui shows the run)", file=sys.stderr)
        for name, why in failed.items():
            print("\n".join(["", name, *why]), file=sys.stderr)
        raise typer.Exit(1)


@app.command("plan")
def plan_run(
    base: Annotated[
        list[str] | None, typer.Option("--base", help="Base model; all by default.")
    ] = None,
    asset: Annotated[
        str, typer.Option("--asset", help="Assets or selections by commas, as in ft run.")
    ] = "*",
    until: Annotated[
        str | None, typer.Option("--until", help="Only this asset and all that it needs.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Predict the time of SFT and DPO on this GPU, e.g. L4."),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(
            "--price", min=0, help="With --gpu: of an hour, in place of launcher.price_per_hour."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Show what `ft run` would do, why, and how long it took the last time. Changes nothing.

    Exit code 1 if a step would be refused.
    """
    project = graph_project()
    names = chosen(project, base)
    dagster_home(project)
    quiet()
    from ft_assets.artifacts import open_store
    from ft_assets.assets.judged import rivals_first
    from ft_assets.commands.status import source_lines, sources
    from ft_assets.data.mixing import expected
    from ft_assets.definitions import build
    from ft_assets.orchestration.run_plan import REFUSED, Plans, table

    keys, plans = select(build(project), asset, until), Plans(project, build)
    steps = {name: plans.of(keys, name) for name in rivals_first(project, names)}
    notes = dict[str, list[str]]()
    if price is not None and gpu is None:
        raise typer.BadParameter("--price needs --gpu, whose hours it counts")
    if gpu is not None:
        from ft_assets.orchestration.time_forecast import outlook, require_known, with_times

        require_known(gpu)
        price = price if price is not None else project.launcher.price()
        steps = {name: with_times(project, plans.store, own, gpu) for name, own in steps.items()}
        notes = {name: outlook(own, gpu, price) for name, own in steps.items()}
    if as_json:
        print(json.dumps([step.to_dict() for found in steps.values() for step in found], indent=1))
    else:
        texts = [
            "\n".join([name, table(found), *(f"  {line}" for line in notes.get(name, []))])
            for name, found in steps.items()
        ]
        print("\n\n".join(texts))
        store = open_store(project)
        for name in names:
            lines = expected(project.data, sources(store, name))
            print("\n".join(source_lines(f"to be trained by {name}", lines)))
        if note := project.launcher.cost_note():
            print(f"\n{note}")
    if any(step.action == REFUSED for found in steps.values() for step in found):
        raise typer.Exit(1)


@app.command()
def status(
    left_out: Annotated[
        bool,
        typer.Option(
            "--left-out", help="Print the rows that are left out, one JSON object a line."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
) -> None:
    """Show the current artifacts, their age and key number, and the size of the store.

    ft plan shows what is out of date.
    """
    project = graph_project()
    quiet()
    from ft_assets.commands import status as command

    if left_out:
        for name, rows in command.left_out(project).items():
            for row in rows:
                print(json.dumps({"base_model": name, **row}, ensure_ascii=False))
        return
    from ft_assets.definitions import build

    graph = build(project).resolve_asset_graph()
    keys = [
        key
        for level in graph.toposorted_asset_keys_by_level
        for key in sorted(level)
        if key in graph.materializable_asset_keys
    ]
    found = command.status(
        project, [(key.to_user_string(), graph.get(key).is_partitioned) for key in keys]
    )
    print(json.dumps(found.model_dump(), indent=1) if as_json else command.table(found))


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 3000,
    host_name: Annotated[
        list[str] | None,
        typer.Option(
            "--host-name",
            help="The host of a proxy before it, e.g. graph.example.org for https, or "
            "http://graph.example.org. Repeatable.",
        ),
    ] = None,
    read_only: Annotated[
        bool,
        typer.Option(
            "--read-only",
            help="For looking only: nothing can be started, and nothing runs by itself.",
        ),
    ] = False,
) -> None:
    """Serve the project's pages and the Dagster UI, bound to this machine only."""
    from ft_assets.ui.services import require_free, serve

    project = graph_project()
    dagster_home(project)
    require_free(port)
    raise typer.Exit(serve(port, host_name or [], read_only))
