"""The command `rows`."""

import dataclasses
import json
import os
import sys
from typing import Annotated

import typer

from ft_assets.cli.app import app
from ft_assets.config import load_project


@app.command()
def rows(
    text: Annotated[
        str,
        typer.Argument(help="Text of a turn or an answer, or a file and line, whatever its case."),
    ] = "",
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; the first by default.")
    ] = None,
    table: Annotated[
        str, typer.Option("--table", help="conversations, preferences, retention, invalid, …")
    ] = "",
    side: Annotated[
        str, typer.Option("--side", help="train, validation, held-out, left out, …")
    ] = "",
    named: Annotated[
        str, typer.Option("--named", help="By the row audit: any, wrong answer, contradiction, …")
    ] = "",
    index: Annotated[
        int | None, typer.Option("--index", min=0, help="The number of a row in its table.")
    ] = None,
    identity: Annotated[str, typer.Option("--id", help="The beginning of a row's id.")] = "",
    offset: Annotated[int, typer.Option("--offset", min=0, help="How many to pass over.")] = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many to list.")] = 20,
    full: Annotated[
        bool, typer.Option("--full", help="Show each row in full, not only a single one.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print an object a row, with turns and tokens.")
    ] = False,
) -> None:
    """List rows of the data, and show one as the model sees it: tokens, what is learnt, its side.

    A row that is left out has the reason and the row that it repeats.
    """
    from ft_assets.artifacts import open_store
    from ft_assets.commands.rows import listed, shown
    from ft_assets.views.row_tokens import RowReader
    from ft_assets.views.rows import RowFinder, Wanted

    project = load_project()
    finder = RowFinder(project, open_store(project), base or next(iter(project.base_models)))
    found = finder.find(Wanted(table, identity, text, side, index, named), offset, limit)
    reader = RowReader(finder)
    if not (as_json or full or found.total == 1):
        print("\n".join(listed(found, offset)))
        return
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number, (line, row) in enumerate(zip(found.lines, found.rows, strict=True)):
        one = reader.show(line, row)
        if as_json:
            print(json.dumps(dataclasses.asdict(one), ensure_ascii=False))
        else:
            print("\n" * (2 * (number > 0)) + "\n".join(shown(one, color)))
    if found.total > offset + len(found.lines) and not as_json:
        print(f"\nrows {offset + 1} to {offset + len(found.lines)} of {found.total}")
