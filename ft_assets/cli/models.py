"""Commands on what was made: report, chat."""

import sys
from typing import Annotated, Any

import typer

from ft_assets.cli.app import app, chosen
from ft_assets.config import load_project


@app.command()
def report(
    base: Annotated[str | None, typer.Option("--base", help="Base model; all by default.")] = None,
    page: Annotated[bool, typer.Option("--page", help="Print the path of the HTML page instead.")] = False,
) -> None:
    """Print the evaluation report, or where its HTML page lies."""
    from ft_assets.artifacts import ArtifactStore

    project = load_project()
    store = ArtifactStore(project.store_path)
    for name in chosen(project, [base] if base else None):
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
