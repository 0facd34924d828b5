"""What Dagster runs at this moment, in a sentence."""

import dagster as dg

from ft_assets.orchestration.materializer import GPU_POOL

GOING = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]


def run_in_progress() -> str | None:
    """Return a sentence about the run that is in progress, None if there is none."""
    with dg.DagsterInstance.get() as instance:
        runs = instance.get_runs(dg.RunsFilter(statuses=GOING), limit=1)
    if not runs:
        return None
    base = runs[0].tags.get("dagster/partition")
    of = f" of {base}" if base else ""
    return f"the run {runs[0].run_id[:8]}{of} is in progress"


def gpu_is_busy() -> str | None:
    """Return a sentence if a step is in the pool of the GPU, else None."""
    with dg.DagsterInstance.get() as instance:
        taken = instance.event_log_storage.get_concurrency_info(GPU_POOL).active_slot_count
    return f"{run_in_progress() or 'a run'} and uses the GPU" if taken else None
