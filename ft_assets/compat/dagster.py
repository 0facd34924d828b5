"""Private parts of Dagster that the run launcher needs; pyproject.toml bounds it at its next minor.

Each function or name here is one hook. ft_assets_tests/test_compat_dagster.py fails when the shape
of a hook changes.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from dagster import DagsterInstance
from dagster._cli.api import execute_run_command
from dagster._cli.utils import get_instance_for_cli
from dagster._core.instance import InstanceRef
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, RunLauncher, WorkerStatus
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import (
    ConfigurableClass,
    ConfigurableClassData,
    deserialize_value,
    serialize_value,
)

# The base classes of a run launcher, and the types of its methods.
__all__ = [
    "CheckRunHealthResult",
    "ConfigurableClass",
    "ConfigurableClassData",
    "InstanceRef",
    "LaunchRunContext",
    "LaunchedRun",
    "RunLauncher",
    "WorkerStatus",
    "execute_run",
    "open_instance",
    "read_run",
    "write_run",
]


@dataclass(frozen=True)
class LaunchedRun:
    """A run as its worker process gets it."""

    run_id: str
    instance: InstanceRef | None


def write_run(context: LaunchRunContext, instance: DagsterInstance) -> tuple[str, str | None]:
    """Return (the argument of a worker process, the Python of the run's code location if known).

    Raises ValueError for a run without a code location.
    """
    run, origin = context.dagster_run, context.job_code_origin
    if origin is None:
        raise ValueError(f"run {run.run_id} does not name its code location")
    arguments = ExecuteRunArgs(
        job_origin=origin, run_id=run.run_id, instance_ref=instance.get_ref()
    )
    return serialize_value(arguments), origin.repository_origin.executable_path


def read_run(argument: str) -> LaunchedRun:
    """Read what `write_run` wrote."""
    arguments = deserialize_value(argument, ExecuteRunArgs)
    return LaunchedRun(arguments.run_id, arguments.instance_ref)


def open_instance(run: LaunchedRun) -> AbstractContextManager[DagsterInstance]:
    """Open the instance of a run in its worker process, as Dagster's commands do."""
    return get_instance_for_cli(instance_ref=run.instance)


def execute_run(argument: str) -> None:
    """Execute the run of a worker's argument in this process, as `dagster api execute_run` does."""
    execute_run_command([argument], prog_name="execute_run")
