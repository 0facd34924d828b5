"""How Dagster's daemon starts a run here, sees whether it lives, and ends it. Named in dagster.yaml as `run_launcher`.

`ft run` needs nothing of this: it executes in its own process.
"""

from ft_assets.runs.launcher import ProcessRunLauncher

__all__ = ["ProcessRunLauncher"]
