"""`ft`: a thin command-line face of the graph and of core.

Exit codes: 0 success, 1 a negative answer or a failed step, 130 interrupted; errors own theirs
(errors.py): 2 the user can fix it, 75 a machine, a store or the network failed: retry. 70 is a
fault of ft_assets or of a library (screen.py).
"""

import os
import sys


def main() -> None:
    """Run `ft`. Any error ends as one screen of text."""
    try:
        _run()
    except KeyboardInterrupt:  # while the outer handler is imported
        sys.exit(130)


def _run() -> None:
    from ft_assets.redaction import guard_stream, without_known
    from ft_assets.screen import one_screen, plain_output

    with one_screen(" ".join(["ft", *sys.argv[1:2]])):
        plain_output()
        guard_stream(sys.stdout, without_known)  # answers and rows are shown as they are
        # Each adds its commands.
        from ft_assets.cli import (  # noqa: F401
            advise,
            graph,
            integrity,
            models,
            project,
            review,
            rows,
        )
        from ft_assets.cli.app import app  # not at module level: it would hide the module

        if "_FT_COMPLETE" in os.environ:
            from ft_assets.cli.completion import offer

            offer(app)
        app()
