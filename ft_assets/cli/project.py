"""Commands on a project and its machine: init, gc, doctor."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ft_assets.cli.app import app, quiet
from ft_assets.config import load_project


@app.command()
def init(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="A file of conversations or pairs, the rows of the task, or a folder of files."
        ),
    ] = None,
    ready: Annotated[
        str | None,
        typer.Option("--from", help="In place of data: a ready project, e.g. llama-8b-24gb."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Hub id, folder, or GGUF file (package://package/file.gguf: in an installed "
            "package); a demo model by default.",
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where finetune.yaml is written.")] = Path(),
    prompt: Annotated[
        str | None,
        typer.Option(help="The column that holds the prompt, if its name is not recognised."),
    ] = None,
    completion: Annotated[
        str | None,
        typer.Option(help="The column that holds the answer, if its name is not recognised."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="An entry of data.columns, ours=yours, e.g. input=context. Repeatable."),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of text files that are not UTF-8, e.g. cp1252.")
    ] = None,
    ignore_turn_key: Annotated[
        list[str] | None,
        typer.Option(help="A key of turns that the model does not need. Repeatable."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print an object: the file, the rows' shape, what cannot be used."
        ),
    ] = False,
) -> None:
    """Write a first finetune.yaml for data files, and describe their rows. Overwrites nothing."""
    from ft_assets.commands.init import describe, summary, write_project
    from ft_assets.commands.init import ready as ready_projects

    if (data is None) == (ready is None):
        names = ", ".join(ready_projects.READY)
        raise typer.BadParameter(f"give a data file or folder, or --from with one of {names}")
    if ready is not None:
        others = (base, prompt, completion, column, encoding, ignore_turn_key)
        if any(others):
            raise typer.BadParameter("--from takes --dir and --json alone: edit its finetune.yaml")
        files = ready_projects.write_ready(ready, folder)
        if as_json:
            print(json.dumps({"from": ready, "files": [str(file) for file in files]}, indent=1))
        else:
            print(ready_projects.describe(ready, files))
        return
    assert data is not None
    columns = {
        ours: theirs for ours, theirs in (("prompt", prompt), ("completion", completion)) if theirs
    }
    for entry in column or []:
        ours, is_pair, theirs = entry.partition("=")
        if not is_pair or not ours or not theirs:
            raise typer.BadParameter(f"{entry!r} is not ours=yours, e.g. prompt=question")
        columns[ours] = theirs
    written = write_project(data, base, folder, columns, encoding, ignore_turn_key or [])
    if as_json:
        print(json.dumps(summary(*written).model_dump(), indent=1, ensure_ascii=False))
    else:
        print(describe(*written))


@app.command()
def gc(
    keep: Annotated[
        int, typer.Option(min=1, help="How many of the newest versions of each asset stay.")
    ] = 2,
    apply: Annotated[
        bool, typer.Option("--apply", help="Delete; without it, only say what would go.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of objects: what goes, or would go.")
    ] = False,
) -> None:
    """Remove old versions and leftovers from the store.

    Current versions, and the versions that they were made from, always stay.
    """
    from ft_assets.artifacts import open_store
    from ft_assets.commands.gc import removals, remove, table

    store = open_store(load_project())
    going, unreadable = removals(store, keep)
    if as_json:
        print(
            json.dumps(
                [
                    {"path": str(one.path), "what": one.what, "why": one.why, "bytes": one.bytes}
                    for one in going
                ],
                indent=1,
            )
        )
    else:
        print(table(going))
    for path in unreadable:
        print(f"left alone: {path}: its manifest cannot be read", file=sys.stderr)
    if not apply:
        if going and not as_json:
            print("nothing was deleted yet: ft gc --apply does it")
        return
    failed = False
    for removal in going:
        try:
            if not remove(store, removal):
                print(f"left alone: {removal.what}: in use meanwhile", file=sys.stderr)
        except OSError as error:
            failed = True
            print(
                f"error: {removal.path}: cannot be deleted ({error.strerror}); "
                "check its permissions",
                file=sys.stderr,
            )
    if failed:
        raise typer.Exit(1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Check the machine, finetune.yaml, the data files and the base models. Changes nothing."""
    quiet()
    from ft_assets.commands.doctor import examine
    from ft_assets.commands.doctor.check import FAIL, table

    checks = examine()
    print(json.dumps([check.to_dict() for check in checks], indent=1) if as_json else table(checks))
    if any(check.state == FAIL for check in checks):
        raise typer.Exit(1)
