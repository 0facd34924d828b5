"""`ft`: a thin face on Dagster and core for those who live in a terminal. Exit codes: 0 done, 1 refused or failed, 2 the user's to fix."""

import sys

from ft_assets.errors import FtError


def main() -> None:
    """Entry point: a user's error is shown as one screen of text."""
    from ft_assets.cli import graph, models, project  # noqa: F401  (each adds its commands)
    from ft_assets.cli.app import app  # not at module level: it would hide the module of that name

    try:
        app()
    except FtError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
