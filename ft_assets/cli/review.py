"""The command `ft review`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ft_assets.cli.app import app
from ft_assets.config import load_project

if TYPE_CHECKING:
    from ft_assets.views.board import Opened


@app.command()
def review(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 3100,
    host_name: Annotated[
        list[str] | None,
        typer.Option("--host-name", help="The host of a proxy before it. Repeatable."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; the first by default.")
    ] = None,
    ask: Annotated[
        Path | None,
        typer.Option(
            "--ask",
            help="First ask base, champion and challenger for fresh prompts: a text file with one "
            "user message a line. Then end.",
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export",
            help="Write the corrections of fresh prompts into this folder, as "
            "review_conversations.jsonl and review_preferences.jsonl. Then end.",
        ),
    ] = None,
) -> None:
    """Open the page on which people compare answers without the models' names."""
    from ft_assets.ui.alone import serve_alone
    from ft_assets.ui.pages.review import PAGE
    from ft_assets.views.board import Opened
    from ft_assets.views.review import need_review

    project = load_project()
    name = base or next(iter(project.base_models))
    project.base_model(name)
    opened = Opened.of(project)
    need_review(opened)
    if export is not None:
        _export(opened, export)
        return
    if ask is not None:
        _ask(opened, name, ask)
        return
    chosen = f"?base_model={name}" if base else ""
    print(f"http://127.0.0.1:{port}/ft/review{chosen}; Ctrl-C ends", file=sys.stderr)
    serve_alone(PAGE, port, host_name or [])


def _ask(opened: "Opened", name: str, file: Path) -> None:
    from ft_assets.review.fresh import questions
    from ft_assets.views.review import ask_fresh
    from ft_assets.views.side_by_side import SideBySide

    def told(text: str) -> None:
        print(text, file=sys.stderr)

    messages = questions(file)
    models = SideBySide(opened.project, name, None, told)
    count = ask_fresh(opened, name, messages, models, told)
    print(f"{count} fresh prompts of {name} are in the review: ft review --base {name}")


def _export(opened: "Opened", folder: Path) -> None:
    from ft_assets.review.corrections import PAIRS, ROWS
    from ft_assets.views.review import corrections_of

    found = corrections_of(opened)
    found.write(folder)
    print(f"{len(found.rows)} rows in {folder / ROWS}, for data.train")
    print(f"{len(found.pairs)} pairs in {folder / PAIRS}, for data.preferences")
    if found.left_out:
        print(
            f"{found.left_out} corrections of held-out prompts are left out: a model that learned "
            "them would be measured on them",
            file=sys.stderr,
        )
