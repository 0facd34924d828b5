"""The run launcher of dagster.yaml: starts, watches and ends runs as processes of their own.

`ft run` needs nothing of this: it executes in its own process.
"""

from ft_assets.runs.launcher import ProcessRunLauncher

__all__ = ["ProcessRunLauncher"]
