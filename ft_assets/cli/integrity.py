"""Commands on the integrity of the store: verify."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ft_assets.cli.app import app, chosen
from ft_assets.config import load_project
from ft_assets.errors import ConfigError


@app.command()
def verify(
    full: Annotated[
        bool,
        typer.Option("--full", help="Read every file again, also those that did not change."),
    ] = False,
    release: Annotated[
        bool,
        typer.Option("--release", help="Verify the signatures of the releases instead."),
    ] = False,
    base: Annotated[
        list[str] | None, typer.Option("--base", help="With --release: base model; all by default.")
    ] = None,
    key: Annotated[
        list[Path] | None,
        typer.Option("--key", help="With --release: a public key, in place of the trusted ones."),
    ] = None,
    at_least: Annotated[
        int, typer.Option("--at-least", help="With --release: number of the last known decision.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
) -> None:
    """Compare every file of the store with its manifest, and name what is damaged and what heals.

    Exit code 1 if anything is damaged, or a release does not verify.
    """
    if release:
        _releases(base, key or [], at_least, as_json)
        return
    if base or key or at_least != 1:
        raise ConfigError(
            where="ft verify",
            found="--base, --key or --at-least without --release",
            expected="--release with them",
            fix="add --release, or remove them",
        )
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


def _releases(base: list[str] | None, keys: list[Path], at_least: int, as_json: bool) -> None:
    """Verify the releases of these base models. Exit code 1 if one does not verify."""
    from ft_assets.artifacts import open_store
    from ft_assets.commands.verify_release import check_releases
    from ft_assets.release.keys import public_key

    project = load_project()
    given = [public_key(path) for path in keys]
    names = chosen(project, base)
    found = check_releases(project, open_store(project), names, given, at_least)
    if as_json:
        print(json.dumps([one.model_dump(exclude_none=True) for one in found], indent=1))
    else:
        print("\n".join(one.to_text() for one in found))
    if any(one.error for one in found):
        raise typer.Exit(1)
