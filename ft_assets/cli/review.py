"""The command `ft review`."""

import sys
from typing import Annotated

import typer

from ft_assets.cli.app import app
from ft_assets.config import load_project


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
) -> None:
    """Open the page on which people compare answers without the models' names."""
    from ft_assets.ui.alone import serve_alone
    from ft_assets.ui.pages.review import PAGE
    from ft_assets.views.board import Opened
    from ft_assets.views.review import need_review

    project = load_project()
    name = base or next(iter(project.base_models))
    project.base_model(name)
    need_review(Opened.of(project))
    chosen = f"?base_model={name}" if base else ""
    print(f"http://127.0.0.1:{port}/ft/review{chosen}; Ctrl-C ends", file=sys.stderr)
    serve_alone(PAGE, port, host_name or [])
