"""The run launcher of dagster.yaml: starts, watches and ends runs as processes of their own.

`ft run` does not use it: it executes runs in its own process.
"""

from ft_assets.runs.launcher import ProcessRunLauncher

__all__ = ["ProcessRunLauncher"]
