"""`ft`: a thin face on Dagster and core for those who live in a terminal. Exit codes: 0 done, 1 refused or failed, 2 the user's to fix,
75 a machine, a store or the network failed: try again."""

import sys

from ft_assets.errors import FtError, InfrastructureFault

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def main() -> None:
    """Entry point: a user's error is shown as one screen of text, a fault of the infrastructure as a sentence."""
    from ft_assets.cli import graph, models, project  # noqa: F401  (each adds its commands)
    from ft_assets.cli.app import app  # not at module level: it would hide the module of that name

    try:
        app()
    except FtError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except InfrastructureFault as error:
        print(
            f"error: {error}\n  to do:    nothing is wrong with the project; try again when it answers",
            file=sys.stderr,
        )
        sys.exit(TRY_AGAIN)
