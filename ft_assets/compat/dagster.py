"""Private parts of Dagster: those that the run launcher needs, and what writes the history.

pyproject.toml bounds Dagster at its next minor.

Each function or name here is one hook. ft_assets_tests/test_compat_dagster.py fails when the shape
of a hook changes.
"""

import inspect
import logging
import subprocess
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from traceback import TracebackException
from types import SimpleNamespace
from typing import Any

import dagster as dg
from dagster import DagsterInstance, EventLogEntry
from dagster._cli.api import execute_run_command
from dagster._cli.utils import get_instance_for_cli
from dagster._core.events import DagsterEvent, JobCanceledData, JobFailureData
from dagster._core.execution import compute_logs
from dagster._core.execution.plan.objects import (
    ErrorSource,
    StepFailureData,
    StepRetryData,
    UserFailureData,
)
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
    "check_sentence",
    "execute_run",
    "failure_sentences",
    "in_plain_words",
    "keep_history_clean",
    "known_asset",
    "open_instance",
    "read_run",
    "report_check",
    "shield_log_readers",
    "was_interrupted",
    "write_run",
]

TO_DO = "to_do"  # metadata of a failed check: the next step, in a sentence
CHECK_FAILED = "DagsterAssetCheckFailedError"
INTERRUPTS = ("DagsterExecutionInterruptedError", "KeyboardInterrupt")
CANCELLED = (
    "cancelled\n  to do:    to go on, start it again: what is done is reused, and a training "
    "resumes from its last checkpoint"
)
LINKS = (dg.UrlMetadataValue, dg.DagsterAssetMetadataValue)
EXPLAINS = {dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.ASSET_CHECK_EVALUATION}
TOLD = {
    dg.DagsterEventType.STEP_FAILURE,
    dg.DagsterEventType.STEP_UP_FOR_RETRY,
    dg.DagsterEventType.PIPELINE_FAILURE,
    dg.DagsterEventType.PIPELINE_CANCELED,
}


@dataclass(frozen=True)
class LaunchedRun:
    """A run as its worker process gets it."""

    run_id: str
    instance: InstanceRef | None


def known_asset(context: dg.AssetExecutionContext, key: dg.AssetKey) -> Any:
    """Return the node of an asset in the graph of the run's code location, or None."""
    graph = context.op_execution_context.job_def.asset_layer.asset_graph
    return graph.get(key) if graph.has(key) else None


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


def keep_history_clean(plain: bool = True) -> None:
    """Write what this process gives Dagster to keep without secrets, and failures in plain words.

    plain: False in a code location of others, whose failures keep their stack traces. The last
    call decides.

    Redacted are errors with all their causes, events, and logs.

    Dagster writes an error as a SerializableErrorInfo wherever it was raised: a step, a sensor, the
    code location. Its own DAGSTER_REDACT_USER_CODE_ERRORS would hide each error whole.
    """
    made = SerializableErrorInfo.from_traceback.__func__  # type: ignore[attr-defined]
    handled = DagsterInstance.handle_new_event
    guard_stream(sys.stderr)
    if getattr(handled, "redacts", False):
        handled.plain = plain  # type: ignore[attr-defined]
        return

    def from_traceback(
        cls: type[SerializableErrorInfo], trace: TracebackException
    ) -> SerializableErrorInfo:
        error = made(cls, trace)  # it calls this function for cause and context
        return error._replace(
            message=redacted(error.message), stack=[redacted(line) for line in error.stack]
        )

    def handle_new_event(self: DagsterInstance, event: EventLogEntry, **options: Any) -> None:
        in_words = handle_new_event.plain  # type: ignore[attr-defined]
        told = in_plain_words(self, event) if in_words else event
        handled(self, redacted_event(told), **options)

    handle_new_event.redacts = True  # type: ignore[attr-defined]
    handle_new_event.plain = plain  # type: ignore[attr-defined]
    SerializableErrorInfo.from_traceback = classmethod(from_traceback)  # type: ignore[assignment]
    DagsterInstance.handle_new_event = handle_new_event  # type: ignore[method-assign]


def in_plain_words(instance: DagsterInstance, event: EventLogEntry) -> EventLogEntry:
    """Return an event whose failure is told by its sentence, where that is known.

    A failed check, a refusal and a cancelled run have no stack trace then. A fault that nobody
    expected keeps its trace. The last event of a failed run has the sentences of its steps.
    """
    found = event.dagster_event
    if found is None:
        # What follows a failure did not fail. The run's page hides the level DEBUG at first.
        skipped = event.user_message.startswith("Dependencies for step ")
        return event._replace(level=logging.DEBUG) if skipped else event
    if found.event_type not in TOLD:
        return event
    earlier = [
        one.dagster_event
        for one in instance.all_logs(event.run_id, of_type=EXPLAINS)
        if one.dagster_event is not None
    ]
    return event._replace(dagster_event=_plain(found, earlier))


def failure_sentences(events: Iterable[DagsterEvent]) -> list[str]:
    """Return why the steps of a run failed, each in its own words, in the order of the failures."""
    events = list(events)
    failed = [event for event in events if event.is_step_failure]
    return [text for event in failed if (text := _sentence(event, events))]


def was_interrupted(event: DagsterEvent) -> bool:
    """Return True if a step or a run ended because somebody cancelled it."""
    error = getattr(event.event_specific_data, "error", None)
    return any(link.cls_name in INTERRUPTS for link in _chain(error))


def _chain(error: SerializableErrorInfo | None) -> list[SerializableErrorInfo]:
    return [error, *_chain(error.cause)] if error else []


def _plain(event: DagsterEvent, earlier: Iterable[DagsterEvent]) -> DagsterEvent:
    data, earlier = event.event_specific_data, list(earlier)
    error = getattr(data, "error", None)
    if isinstance(data, StepRetryData):
        return event._replace(event_specific_data=data._replace(error=_bare(_chain(error)[-1])))
    if isinstance(data, StepFailureData):
        text = _sentence(event, earlier)
        if not text or not (data.user_failure_data or _is_expected(event)):
            return event
        assert error is not None, "a step that failed has an error"
        user = data.user_failure_data or UserFailureData(
            label="check", description=text, metadata=_links(_refused(event, earlier))
        )
        # A source of user code would look for a cause, which is told already.
        source = ErrorSource.INTERRUPT if was_interrupted(event) else ErrorSource.FRAMEWORK_ERROR
        return event._replace(
            message=f"{event.step_key}: {text}",
            event_specific_data=StepFailureData(_bare(error, text), user, source),
        )
    if isinstance(data, JobFailureData | JobCanceledData) and was_interrupted(event):
        return event._replace(message=CANCELLED, event_specific_data=data._replace(error=None))
    if isinstance(data, JobFailureData) and data.first_step_failure_event is not None:
        first = _plain(data.first_step_failure_event, earlier)
        texts = failure_sentences(earlier) or failure_sentences([first])
        kept = JobFailureData(None, data.failure_reason, first)
        return event._replace(message="\n".join(texts), event_specific_data=kept)
    return event


def _bare(error: SerializableErrorInfo, text: str | None = None) -> SerializableErrorInfo:
    """Return an error without stack, cause and context."""
    return SerializableErrorInfo(text or error.message.strip(), [], error.cls_name)


def _is_expected(event: DagsterEvent) -> bool:
    names = {link.cls_name for link in _chain(event.step_failure_data.error)}
    return was_interrupted(event) or CHECK_FAILED in names


def _sentence(event: DagsterEvent, events: Iterable[DagsterEvent]) -> str:
    """Return why a step failed: the user's error as it was written, else what Dagster reports."""
    failure = event.step_failure_data
    if failure.user_failure_data is not None and failure.user_failure_data.description:
        return failure.user_failure_data.description
    if was_interrupted(event):
        return CANCELLED
    refused = _refused(event, events)
    if refused:
        return "\n".join(map(check_sentence, refused))
    chain = _chain(failure.error)
    return (chain[1] if len(chain) > 1 else chain[0]).message.strip() if chain else ""


def _refused(event: DagsterEvent, events: Iterable[DagsterEvent]) -> list[dg.AssetCheckEvaluation]:
    """Return the evaluations by which the step of a failed check failed."""
    if CHECK_FAILED not in {link.cls_name for link in _chain(event.step_failure_data.error)}:
        return []
    found = [
        one.asset_check_evaluation_data
        for one in events
        if one.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
        and one.step_key == event.step_key
    ]
    return [one for one in found if not one.passed and one.severity == dg.AssetCheckSeverity.ERROR]


def check_sentence(evaluation: dg.AssetCheckEvaluation) -> str:
    """Return what a failed check found, and the next step."""
    name = f"{evaluation.asset_key.to_user_string()}/{evaluation.check_name}"
    fix = evaluation.metadata.get(TO_DO)
    text = f"{name}: {evaluation.description or 'failed'}"
    return f"{text}\n  to do:    {fix.value}" if fix else text


def _links(refused: Iterable[dg.AssetCheckEvaluation]) -> dict[str, Any]:
    """Return the metadata that leads from the failure of a check to what it is about."""
    links = dict[str, Any]()
    for one in refused:
        links |= {"look_at": dg.MetadataValue.asset(one.asset_key)}
        links |= {key: value for key, value in one.metadata.items() if value.__class__ in LINKS}
    return links


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


def shield_log_readers() -> None:
    """Keep Ctrl-C from the processes that copy a step's output, which would print stack traces.

    Dagster ends them when the step has ended, or when this process has.
    """
    separate = partial(subprocess.Popen, start_new_session=True)
    compute_logs.subprocess = SimpleNamespace(Popen=separate)  # type: ignore[assignment]


def call_body(asset: dg.AssetsDefinition, context: Any, materializer: Any) -> Any:
    """Call an asset's function without Dagster and without its decorators.

    Its config has its defaults.
    """
    compute: Any = asset.op.compute_fn
    body = inspect.unwrap(compute.decorated_fn)
    config = inspect.signature(body).parameters.get("config")
    given = {} if config is None else {"config": config.annotation()}
    return body(context, materializer=materializer, **given)
