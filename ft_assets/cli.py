"""`ft`: a thin face on Dagster and core for those who live in a terminal. Exit codes: 0 done, 1 refused or failed, 2 the user's to fix."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ft_assets.config import Project, find_config, load_project
from ft_assets.errors import FtError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune, prove, merge: the asset graph from a terminal.",
)


def main() -> None:
    """Entry point: a user's error is shown as one screen of text."""
    try:
        app()
    except FtError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def dagster_home(project: Project) -> Path:
    """Return DAGSTER_HOME, by default .ft/dagster beside finetune.yaml, with our dagster.yaml in it."""
    home = Path(os.environ.get("DAGSTER_HOME") or project.root / ".ft" / "dagster")
    home.mkdir(parents=True, exist_ok=True)
    os.environ["DAGSTER_HOME"] = str(home)
    settings = home / "dagster.yaml"
    if not settings.exists():
        settings.write_text(
            "telemetry: {enabled: false}\n"
            "nux: {enabled: false}  # no sign-up dialog over the UI\n"
            "# Pool gpu: one training or evaluation at a time, over all runs. Two GPUs: dagster instance concurrency set gpu 2\n"
            "concurrency: {pools: {default_limit: 1, granularity: op}}\n"
            "run_monitoring: {enabled: true, free_slots_after_run_end_seconds: 300}\n"
        )
    return home


@app.command()
def run(
    base: Annotated[list[str] | None, typer.Option("--base", help="Base model; all by default.")] = None,
    asset: Annotated[
        str, typer.Option("--asset", help="Assets or selections by commas, e.g. 'eval_report,merged_model' or 'lora_adapter+'.")
    ] = "*",
) -> None:
    """Materialize assets; steps whose inputs did not change are reused."""
    project = load_project()
    names = base or list(project.base_models)
    for name in names:
        project.base_model(name)
    os.environ["FT_CONFIG"] = str(find_config())
    dagster_home(project)
    _quiet()
    import dagster as dg

    from ft_assets.console import failures
    from ft_assets.definitions import defs

    instance = dg.DagsterInstance.get()
    job = defs.resolve_implicit_global_asset_job_def()
    keys = _select(defs, asset)
    partitioned = any(defs.resolve_asset_graph().get(key).is_partitioned for key in keys)
    failed = []
    for name in names if partitioned else [None]:
        print(f"\n{name or 'unpartitioned'}", file=sys.stderr)
        outcome = job.execute_in_process(
            instance=instance,
            partition_key=name,
            asset_selection=keys,
            raise_on_error=False,
            run_config={"loggers": {"console": {}}},
            tags={"ft/base_model": name} if name else None,
        )
        if not outcome.success:
            failed.append(name or asset)
            print("\n".join(["", *failures(outcome.all_events)]), file=sys.stderr)
    if failed:
        print(f"\nnot all done: {', '.join(failed)} (see above; make ui shows the run)", file=sys.stderr)
        raise typer.Exit(1)


@app.command("plan")
def plan_run(
    base: Annotated[list[str] | None, typer.Option("--base", help="Base model; all by default.")] = None,
    asset: Annotated[str, typer.Option("--asset", help="Assets or selections by commas, as in ft run.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Say what `ft run` would do and why, and how long it took the last time. Makes nothing."""
    project = load_project()
    names = base or list(project.base_models)
    for name in names:
        project.base_model(name)
    os.environ["FT_CONFIG"] = str(find_config())
    dagster_home(project)
    _quiet()
    from ft_assets.assets.plan import plan, table
    from ft_assets.definitions import build

    keys = _select(build(project), asset)
    steps = {name: plan(project, build, keys, name) for name in names}
    if as_json:
        print(json.dumps([step.to_dict() for found in steps.values() for step in found], indent=1))
    else:
        print("\n\n".join(f"{name}\n{table(found)}" for name, found in steps.items()))


def _select(defs: Any, text: str) -> list[Any]:
    import dagster as dg

    graph = defs.resolve_asset_graph()
    keys = set()
    for part in text.split(","):
        try:
            keys |= dg.AssetSelection.from_string(part.strip()).resolve(graph)
        except Exception as error:  # Dagster's own parse errors have no common class
            known = ", ".join(sorted(key.to_user_string() for key in graph.materializable_asset_keys))
            raise FtError(f"--asset {part}", str(error).splitlines()[0], "assets or selections, by commas", f"assets: {known}") from None
    return [key for key in keys if key in graph.materializable_asset_keys]


def _quiet() -> None:
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("dagster").setLevel(logging.ERROR)


@app.command()
def report(
    base: Annotated[str | None, typer.Option("--base", help="Base model; all by default.")] = None,
    page: Annotated[bool, typer.Option("--page", help="Print the path of the HTML page instead.")] = False,
) -> None:
    """Print the evaluation report, or where its HTML page lies."""
    from ft_assets.artifacts import ArtifactStore

    project = load_project()
    store = ArtifactStore(project.store_path)
    for name in [base] if base else list(project.base_models):
        project.base_model(name)
        folder = store.need("eval_report", name).path
        print(folder / "info" / "report.html" if page else (folder / "report.md").read_text())


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="One message; without it, a conversation line by line.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model; the first by default.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System turn; by default the one of the training data.")] = None,
) -> None:
    """Talk to the base and to the merged model side by side."""
    from ft_assets.chat.side_by_side import SideBySide

    project = load_project()
    name = base or next(iter(project.base_models))
    project.base_model(name)
    pair = SideBySide(project, name, system)
    lines = [message] if message else _prompted()
    for line in lines:
        for who, text in pair.answers(line):
            print(f"{who:>7}: {text}")


def _prompted() -> Any:
    print("an empty line or Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 3000,
    host_name: Annotated[
        list[str] | None, typer.Option("--host-name", help="The Host of a proxy before it, e.g. graph.example.org. Repeatable.")
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="For looking only: nothing can be started, and nothing runs by itself.")
    ] = False,
) -> None:
    """Open the Dagster UI (webserver and daemon) on the instance that `ft run` fills. Bound to this machine only."""
    from ft_assets.ui.services import serve

    project = load_project()
    os.environ["FT_CONFIG"] = str(find_config())
    dagster_home(project)
    raise typer.Exit(serve("ft_assets.definitions", port, host_name or [], read_only))


@app.command()
def init(
    data_file: Annotated[Path, typer.Argument(help="A file of conversations; its rows say what the task is.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="Hub id, folder, or GGUF file (package://package/file.gguf: in an installed package); a demo model by default."
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where finetune.yaml is written.")] = Path(),
    prompt: Annotated[str | None, typer.Option(help="The column that holds the prompt, if its name is not recognised.")] = None,
    completion: Annotated[str | None, typer.Option(help="The column that holds the answer, if its name is not recognised.")] = None,
) -> None:
    """Write a first finetune.yaml for a data file, and say what its rows look like. Overwrites nothing."""
    from ft_assets.commands.init import said, write_project

    columns = {ours: theirs for ours, theirs in (("prompt", prompt), ("completion", completion)) if theirs}
    print(said(*write_project(data_file, base, folder, columns)))


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False) -> None:
    """Say what has been made, when, and its key number; and how large the store is. What is out of date: ft plan."""
    project = load_project()
    os.environ["FT_CONFIG"] = str(find_config())
    _quiet()
    from ft_assets.commands.status import status as look
    from ft_assets.commands.status import table
    from ft_assets.definitions import build

    graph = build(project).resolve_asset_graph()
    keys = [key for level in graph.toposorted_asset_keys_by_level for key in sorted(level) if key in graph.materializable_asset_keys]
    found = look(project, [(key.to_user_string(), graph.get(key).is_partitioned) for key in keys])
    print(json.dumps(found.to_dict(), indent=1) if as_json else table(found))


@app.command()
def gc(
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions of each asset stay.")] = 2,
    apply: Annotated[bool, typer.Option("--apply", help="Delete; without it, only say what would go.")] = False,
) -> None:
    """Remove old versions and leftovers from the store. What is current, and what it was made from, always stays."""
    from ft_assets.commands.gc import removals, remove, table

    root = load_project().store_path
    going, unreadable = removals(root, keep)
    print(table(going))
    for path in unreadable:
        print(f"left alone: {path}: its manifest cannot be read", file=sys.stderr)
    if not apply:
        print("nothing was deleted yet: ft gc --apply does it" if going else "", end="\n" if going else "")
        return
    failed = False
    for removal in going:
        try:
            if not remove(removal):
                print(f"left alone: {removal.what}: in use meanwhile", file=sys.stderr)
        except OSError as error:
            failed = True
            print(f"error: {removal.path}: cannot be deleted ({error.strerror}); check its permissions", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False) -> None:
    """Look at the machine, finetune.yaml, the data files and the base models: what is wrong, and what to do. Makes nothing."""
    _quiet()
    from ft_assets.commands.checkup import FAIL, table
    from ft_assets.commands.doctor import examine

    checks = examine()
    print(json.dumps([check.to_dict() for check in checks], indent=1) if as_json else table(checks))
    if any(check.state == FAIL for check in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
