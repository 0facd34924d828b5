"""Commands on artifacts: report, explain, chat, release, export, serve."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Annotated, Any

import typer

from ft_assets.cli.app import app, chosen, quiet
from ft_assets.config import Project, load_project
from ft_assets.errors import ConfigError
from ft_assets.orchestration.instance import dagster_home, open_instance


@app.command()
def report(
    base: Annotated[str | None, typer.Option("--base", help="Base model; all by default.")] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Print the path of the HTML page instead.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print an object, {base model: its report}.")
    ] = False,
) -> None:
    """Print the evaluation report, or the path of its HTML page."""
    from ft_assets.artifacts import open_store

    project = load_project()
    store = open_store(project)
    if as_json:
        folders = {
            name: store.verified(store.need("eval_report", name)).path
            for name in chosen(project, [base] if base else None)
        }
        print(
            json.dumps(
                {
                    name: json.loads((folder / "report.json").read_text())
                    for name, folder in folders.items()
                },
                indent=1,
            )
        )
        return
    for name in chosen(project, [base] if base else None):
        folder = store.verified(store.need("eval_report", name)).path
        print(folder / "info" / "report.html" if page else (folder / "report.md").read_text())


@app.command()
def explain(
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; the first by default.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of questions with their answers.")
    ] = False,
) -> None:
    """Answer five questions about fine-tuning with the numbers of the current run."""
    from ft_assets.commands.explain import explain as sections_of
    from ft_assets.commands.explain import show

    project = load_project()
    name = base or next(iter(project.base_models))
    project.base_model(name)
    sections = sections_of(project, name)
    if as_json:
        print(json.dumps([dataclasses.asdict(section) for section in sections], indent=1))
        return
    show(sections)


@app.command()
def chat(
    message: Annotated[
        str | None, typer.Argument(help="One message; without it, a conversation line by line.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; the first by default.")
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", help="System turn; by default the one of the training data."),
    ] = None,
) -> None:
    """Talk to the base, the champion and the challenger side by side."""
    # Beside other work, threads that spin while they wait take most of the time. OpenMP reads it
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ft_assets.views.side_by_side import SideBySide

    project = load_project()
    name = base or next(iter(project.base_models))
    project.base_model(name)
    pair = SideBySide(project, name, system, lambda text: print(text, file=sys.stderr))
    lines = [message] if message else _prompted()
    for line in lines:
        for who, text in pair.answers(line):
            print(f"{who:>10}: {text}")


@app.command()
def release(
    base: Annotated[
        list[str] | None, typer.Option("--base", help="Base model; all by default.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="First make a register whole that is refused, and say what was done."
        ),
    ] = False,
    approve: Annotated[
        str,
        typer.Option("--approve", help="Approve the proposal with this version of merged_model."),
    ] = "",
    reject: Annotated[
        str,
        typer.Option("--reject", help="Reject the proposal with this version of merged_model."),
    ] = "",
    who: Annotated[
        str | None,
        typer.Option("--name", help="With an answer: your name; by default your user name."),
    ] = None,
    reason: Annotated[
        str, typer.Option("--reason", help="With an answer: why, in a sentence.")
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print an object, {base model: its release}.")
    ] = False,
) -> None:
    """Show the released model, why, and the one before. Exit code 1 if nothing is released.

    With release.approval: required, --approve or --reject answers a proposal.
    """
    from ft_assets.artifacts import open_store
    from ft_assets.release.lookup import current_release, need_champion
    from ft_assets.release.register import state_of
    from ft_assets.release.whole_register import repair as repaired

    project = load_project()
    if approve or reject:
        _answer(project, base, {"approve": approve, "reject": reject}, who, reason)
    elif who or reason:
        raise ConfigError(
            where="ft release",
            found="--name or --reason without an answer",
            expected="--approve VERSION or --reject VERSION with them",
            fix="add one of them",
        )
    if repair:
        for name in chosen(project, base):
            print(f"{name}: {repaired(open_store(project), name)}", file=sys.stderr)
    store, found = open_store(project), dict[str, Any]()
    for name in chosen(project, base):
        released = current_release(store, name)
        if released is None:
            found[name] = None
            if not as_json:
                print(f"{name}: nothing is released\n")
            continue
        if state_of(released).champion is None:  # the first one awaits approval, or was rejected
            found[name] = None
            if not as_json:
                page = (released.path / "release.md").read_text()
                print(f"{name}: nothing is released\n\n{page}")
            continue
        path = store.verified(need_champion(store, name, f"release[{name}]")[1]).path
        found[name] = {
            **json.loads((released.path / "release.json").read_text()),
            "path": str(path),
        }
        if not as_json:
            print(f"{name}: {path}\n\n{(released.path / 'release.md').read_text()}")
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    if None in found.values():
        raise typer.Exit(1)


def _answer(
    project: Project,
    base: list[str] | None,
    versions: dict[str, str],
    who: str | None,
    reason: str,
) -> None:
    """Answer the proposal of one base model by --approve or --reject."""
    import getpass

    from ft_assets.artifacts import open_store
    from ft_assets.orchestration.approve_release import answer_and_report, answer_of

    names = chosen(project, base)
    if len(names) != 1 or all(versions.values()):
        raise ConfigError(
            where="ft release",
            found="both --approve and --reject"
            if all(versions.values())
            else f"an answer for {len(names)} base models",
            expected="one answer for one base model",
            fix=f"give one of them, with --base {names[0]}",
        )
    decision, version = next((key, value) for key, value in versions.items() if value)
    user = getpass.getuser()
    given = answer_of(
        decision=decision,
        version=version,
        name=who or user,
        reason=reason,
        by=f"ft release, user {user}",
    )
    dagster_home(project)
    quiet()
    with open_instance() as instance:
        answer_and_report(project, open_store(project), names[0], given, instance)


@app.command()
def export(
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; the first by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
) -> None:
    """Show the exported serving formats (release.forms), their paths, and their agreement.

    Agreement is with the merged model.
    """
    from ft_assets.artifacts import open_store

    project = load_project()
    name = base or next(iter(project.base_models))
    project.base_model(name)
    store = open_store(project)
    folder = store.verified(store.need("export", name)).path
    if as_json:
        print(
            json.dumps(
                {**json.loads((folder / "export.json").read_text()), "path": str(folder)},
                indent=1,
                ensure_ascii=False,
            )
        )
    else:
        print(f"{folder}\n\n{(folder / 'README.md').read_text()}")


@app.command()
def serve(
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; the first by default.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8000,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="vllm or transformers; by default what is installed."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what would be started, and start nothing.")
    ] = False,
) -> None:
    """Serve the released model on this machine, as an OpenAI-compatible endpoint for trials."""
    from ft_assets.artifacts import open_store
    from ft_assets.export.serving import LOOPBACK, choose_engine, serve_command
    from ft_assets.release.signing import proven_release
    from ft_assets.views.side_by_side import usual_system

    project = load_project()
    name = base or next(iter(project.base_models))
    project.base_model(name)
    store = open_store(project)
    model = proven_release(project, store, name, "ft serve").champion
    chosen_engine = choose_engine(engine)
    command = serve_command(chosen_engine, name, model.path, port)
    url = f"http://{LOOPBACK}:{port}/v1"
    if as_json:
        print(
            json.dumps(
                {
                    "model": name,
                    "folder": str(model.path),
                    "engine": chosen_engine,
                    "url": url,
                    "command": command,
                },
                indent=1,
            )
        )
        return
    print(
        f"{chosen_engine} loads {model.path}\nfor OpenAI clients: base URL {url}, model {name}, "
        "any API key; Ctrl-C ends",
        file=sys.stderr,
    )
    if system := usual_system(store, name):
        print(f"trained with this system turn, so send it: {system}", file=sys.stderr)
    try:
        code = subprocess.call(command)
    except KeyboardInterrupt:
        code = 0
    raise typer.Exit(code and 1)


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
