"""`ft`: a thin command-line face of the graph and of core.

Exit codes: 0 success, 1 a negative answer or a failed step, 130 interrupted; errors own theirs
(errors.py): 2 the user can fix it, 75 a machine, a store or the network failed: retry.
"""

import sys

from ft_assets.errors import FtError, InfrastructureFault


def main() -> None:
    """Run `ft`. A user's error ends as one screen of text, an infrastructure fault as one line."""
    from ft_assets.cli import graph, models, project  # noqa: F401  (each adds its commands)
    from ft_assets.cli.app import app  # not at module level: it would hide the module of that name

    try:
        app()
    except FtError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except InfrastructureFault as error:
        print(f"error: {error}", file=sys.stderr)
        print("  to do:    nothing to change in the project; try again later", file=sys.stderr)
        sys.exit(error.exit_code)
