"""Commands on the integrity of the store: verify."""

import json
import time
from typing import Annotated

import typer

from ft_assets.cli.app import app
from ft_assets.config import load_project


@app.command()
def verify(
    full: Annotated[
        bool,
        typer.Option("--full", help="Read every file again, also those that did not change."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
) -> None:
    """Compare every file of the store with its manifest, and name what is damaged and what heals.

    Exit code 1 if anything is damaged.
    """
    from ft_assets.artifacts import open_store
    from ft_assets.commands.verify import outcome, table
    from ft_assets.commands.verify import verify as check

    project = load_project()
    store = open_store(project)
    begun = time.monotonic()
    found = check(store, full)
    done = outcome(project.store_url or str(store.root), found, time.monotonic() - begun)
    print(json.dumps(done.model_dump(), indent=1) if as_json else table(done))
    if done.damaged:
        raise typer.Exit(1)
