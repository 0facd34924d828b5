"""A run's process: it tags the run with its own identity, and then executes the run.

    python -m ft_assets.runs.worker '<ExecuteRunArgs>'

The process writes the tag itself, and first: a launcher that is killed after starting it could not,
and a started run without the tag could not be found.
"""

import sys

from ft_assets.compat.dagster import execute_run, open_instance, read_run
from ft_assets.orchestration.mark_stale import settle
from ft_assets.redaction import guard_stream
from ft_assets.runs.process import TAG, RunProcess
from ft_assets.screen import one_screen


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ft_assets.runs.worker '<ExecuteRunArgs>'")
    guard_stream(sys.stdout)  # the compute log, as stderr is
    with one_screen("the run"):
        run = read_run(sys.argv[1])
        with open_instance(run) as instance:
            instance.add_run_tags(run.run_id, {TAG: RunProcess.this(run.run_id).model_dump_json()})
        execute_run(sys.argv[1])
        with open_instance(run) as instance:
            settle(instance, run.run_id)


if __name__ == "__main__":
    main()
