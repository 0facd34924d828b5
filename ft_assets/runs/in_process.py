"""Runs that execute in the process that starts them (`ft run`).

Their tags hold the process, like those of the launcher, so that the next `ft run` finds a run whose
process was killed. Nothing else would end it, and it would hold its place in the pool forever.
"""

import sys
import time
import uuid
from collections.abc import Sequence

from dagster import (
    AssetKey,
    DagsterInstance,
    DagsterRunStatus,
    ExecuteInProcessResult,
    JobDefinition,
    RunsFilter,
)

from ft_assets.compat.dagster import CANCELLED
from ft_assets.orchestration.console import interrupted
from ft_assets.orchestration.mark_stale import settle
from ft_assets.runs.launcher import end_run
from ft_assets.runs.process import TAG, RunProcess

# A step whose run died has 30 seconds for a checkpoint, and holds the GPU until then.
LAST_CHECKPOINT_SECONDS = 40.0
UNDER_WAY = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]


def execute(
    job: JobDefinition, instance: DagsterInstance, keys: Sequence[AssetKey], partition: str | None
) -> ExecuteInProcessResult | None:
    """Execute assets in a run of this process. Returns its result, None if it was interrupted."""
    run_id = str(uuid.uuid4())
    outcome = job.execute_in_process(
        run_id=run_id,
        instance=instance,
        partition_key=partition,
        asset_selection=keys,
        raise_on_error=False,
        run_config={"loggers": {"console": {}}},
        tags={TAG: RunProcess.this(run_id).model_dump_json()},
    )
    settle(instance, run_id)
    if interrupted(outcome.all_events):
        _cancel(instance, run_id)
        return None
    return outcome


def _cancel(instance: DagsterInstance, run_id: str) -> None:
    """Mark a run cancelled that was interrupted in this process.

    Dagster reports an interrupt as a failure, which the daemon would start again.
    """
    instance.add_run_tags(run_id, {"dagster/will_retry": "false"})
    run = instance.get_run_by_id(run_id)
    assert run is not None, "an executed run has a record"
    instance.report_run_canceled(run, CANCELLED)


def end_dead_runs(instance: DagsterInstance) -> list[str]:
    """Mark failed the runs whose process on this machine was killed, and return their ids.

    If a process died just now, wait for the checkpoint of its step, which ends by itself.
    """
    ended = []
    for run in instance.get_runs(RunsFilter(statuses=UNDER_WAY)):
        process = RunProcess.of(run.run_id, run.tags)
        if process is None or not process.here or process.alive:
            continue
        events = instance.event_log_storage.get_records_for_run(
            run.run_id, limit=1, ascending=False
        ).records
        wait = LAST_CHECKPOINT_SECONDS - (time.time() - events[0].timestamp) if events else 0.0
        if wait > 0:
            print(
                f"run {run.run_id[:8]} was killed just now: waiting {wait:.0f} s "
                "for the checkpoint of its step",
                file=sys.stderr,
            )
            time.sleep(wait)
        end_run(instance, run.run_id, f"{process} exited unexpectedly")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        ended.append(run.run_id)
    return ended
