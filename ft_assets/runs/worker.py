"""A run's process: it writes down which process it is, then lets Dagster execute the run.

    python -m ft_assets.runs.worker '<ExecuteRunArgs>'

It writes this itself, and first: a launcher that is killed after starting it could not, and a run that has begun without it
would be one that nobody can find.
"""

import sys

from dagster._cli.api import execute_run_command
from dagster._cli.utils import get_instance_for_cli
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import deserialize_value

from ft_assets.runs.process import TAG, RunProcess


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ft_assets.runs.worker '<ExecuteRunArgs>'")
    given = deserialize_value(sys.argv[1], ExecuteRunArgs)
    with get_instance_for_cli(instance_ref=given.instance_ref) as instance:
        instance.add_run_tags(given.run_id, {TAG: RunProcess.this(given.run_id).model_dump_json()})
    execute_run_command([sys.argv[1]], prog_name="execute_run")


if __name__ == "__main__":
    main()
