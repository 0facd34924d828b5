"""Private parts of Dagster: those that the run launcher needs, and what writes the history.

pyproject.toml bounds Dagster at its next minor.

Each function or name here is one hook. ft_assets_tests/test_compat_dagster.py fails when the shape
of a hook changes.
"""

import inspect
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from traceback import TracebackException
from typing import Any

import dagster as dg
from dagster import DagsterInstance, EventLogEntry
from dagster._cli.api import execute_run_command
from dagster._cli.utils import get_instance_for_cli
from dagster._core.events import DagsterEvent
from dagster._core.instance import InstanceRef
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, RunLauncher, WorkerStatus
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import (
    ConfigurableClass,
    ConfigurableClassData,
    deserialize_value,
    serialize_value,
)
from dagster_shared.error import SerializableErrorInfo

from ft_assets.redaction import guard_stream, redacted, without_known

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
    "keep_secrets_out_of_history",
    "open_instance",
    "read_run",
    "report_check",
    "write_run",
]


@dataclass(frozen=True)
class LaunchedRun:
    """A run as its worker process gets it."""

    run_id: str
    instance: InstanceRef | None


def report_check(
    instance: DagsterInstance, run_id: str, evaluation: dg.AssetCheckEvaluation
) -> None:
    """Store a check's evaluation as of a run.

    Without a run, as `report_runless_asset_event` stores it, the database takes one evaluation of a
    partition and refuses the second.
    """
    instance.report_dagster_event(
        run_id=run_id,
        dagster_event=DagsterEvent(
            event_type_value=dg.DagsterEventType.ASSET_CHECK_EVALUATION.value,
            event_specific_data=evaluation,
            job_name="",
        ),
    )


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


def keep_secrets_out_of_history() -> None:
    """Redact what this process gives Dagster to keep: errors with all their causes, events, logs.

    Dagster writes an error as a SerializableErrorInfo wherever it was raised: a step, a sensor, the
    code location. Its own DAGSTER_REDACT_USER_CODE_ERRORS would hide each error whole.
    """
    made = SerializableErrorInfo.from_traceback.__func__  # type: ignore[attr-defined]
    handled = DagsterInstance.handle_new_event
    guard_stream(sys.stderr)
    if getattr(handled, "redacts", False):
        return

    def from_traceback(
        cls: type[SerializableErrorInfo], trace: TracebackException
    ) -> SerializableErrorInfo:
        error = made(cls, trace)  # it calls this function for cause and context
        return error._replace(
            message=redacted(error.message), stack=[redacted(line) for line in error.stack]
        )

    def handle_new_event(self: DagsterInstance, event: EventLogEntry, **options: Any) -> None:
        handled(self, redacted_event(event), **options)

    handle_new_event.redacts = True  # type: ignore[attr-defined]
    SerializableErrorInfo.from_traceback = classmethod(from_traceback)  # type: ignore[assignment]
    DagsterInstance.handle_new_event = handle_new_event  # type: ignore[method-assign]


def redacted_event(event: EventLogEntry) -> EventLogEntry:
    """Return an event without secrets.

    Metadata may show rows of the data, which are not altered by what looks like a secret: they lose
    only the secret values of the environment.
    """
    text = serialize_value(event)
    if (known := without_known(text)) != text:
        event = deserialize_value(known, EventLogEntry)
    if (message := redacted(event.user_message)) != event.user_message:
        event = event._replace(user_message=message)
    return event


def call_body(asset: dg.AssetsDefinition, context: Any, materializer: Any) -> Any:
    """Call an asset's function without Dagster and without its decorators.

    Its config has its defaults.
    """
    compute: Any = asset.op.compute_fn
    body = inspect.unwrap(compute.decorated_fn)
    config = inspect.signature(body).parameters.get("config")
    given = {} if config is None else {"config": config.annotation()}
    return body(context, materializer=materializer, **given)
