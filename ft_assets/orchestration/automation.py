"""Automation: the retraining schedule and the alerts, off by default, and the leaderboard's sensor.

The sensors that mark and rerun what is out of date are in `watch` and `rerun_stale`.
"""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from ft_assets.config import FreshnessSettings, Project, ScheduleSettings
from ft_assets.errors import ConfigError
from ft_assets.orchestration.alerts import alert_sensors
from ft_assets.orchestration.place import key_of, name_of

# These age for a user if nothing retrains.
PROVEN = {"eval_report", "merged_model"}
BOARD, RETRAIN = "leaderboard", "retrain"
# Automatic runs queue behind the runs that a person started.
AFTER_PEOPLE = {"dagster/priority": "-1"}
LEADERBOARD_SECONDS = 120  # each look of a sensor costs some 60 ms of CPU time


def freshness(settings: FreshnessSettings | None, key: dg.AssetKey) -> dg.FreshnessPolicy | None:
    """Return the policy that marks a report or a merged model as overdue.

    A run that reuses the artifact counts, because it verified that nothing changed.
    """
    if settings is None or name_of(key) not in PROVEN:
        return None
    warn, fail = (
        datetime.timedelta(hours=hours)
        for hours in (settings.warn_after_hours, settings.fail_after_hours)
    )
    return dg.FreshnessPolicy.time_window(fail_window=fail, warn_window=warn)


def automation(
    project: Project, assets: Sequence[str], base_models: dg.PartitionsDefinition
) -> tuple[list[dg.ScheduleDefinition], list[dg.SensorDefinition], list]:
    """Return (schedules, sensors, jobs) of a project with these assets."""

    retrain = dg.define_asset_job(
        project.place.name(RETRAIN),
        selection=dg.AssetSelection.assets(*(key_of(project, asset) for asset in assets)),
        partitions_def=base_models,
        executor_def=dg.in_process_executor,  # heavy steps are child processes already
        description="All assets of one base model. Steps whose inputs did not change are reused.",
    )
    schedules = [_schedule(project, project.schedule, retrain)] if project.schedule else []
    board = _leaderboard_after_failure(project, retrain)
    return schedules, [board, *alert_sensors(project)], [retrain]


def _leaderboard_after_failure(project: Project, job: Any) -> dg.SensorDefinition:
    """Build the sensor that makes the leaderboard after a failed run.

    The failed run skips the leaderboard, because it is below the failed step, and it would go on
    showing the former verdict. The sensor is on by default: it only follows runs that a person or
    another sensor started.
    """

    board = key_of(project, BOARD)

    @dg.run_failure_sensor(
        name=project.place.name("leaderboard_after_failure"),
        request_job=job,
        minimum_interval_seconds=LEADERBOARD_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Makes the leaderboard after a failed run that should have made it, so that it "
        "shows the failure.",
    )
    def sensor(context: dg.RunFailureSensorContext) -> dg.RunRequest | dg.SkipReason:
        run = context.dagster_run
        chosen = run.asset_selection or (
            frozenset() if run.job_name != job.name else None
        )  # None: all that the job makes
        if chosen is not None and (board not in chosen or chosen == {board}):
            return dg.SkipReason("the run was not to make the leaderboard, or nothing else")
        return dg.RunRequest(
            run_key=run.run_id,
            asset_selection=[board],
            tags={"ft/started_by": "leaderboard_after_failure"},
        )

    return sensor


def _schedule(project: Project, settings: ScheduleSettings, job: Any) -> dg.ScheduleDefinition:
    """Build the schedule: one run for each base model at each tick.

    Raises ConfigError for an invalid time.
    """

    def requests(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
        tags = {"ft/started_by": "retrain_schedule", **AFTER_PEOPLE}
        at = context.scheduled_execution_time.isoformat()
        for name in project.base_models:
            yield dg.RunRequest(run_key=f"{at}-{name}", partition_key=name, tags=tags)

    with valid_cron("schedule"):
        return dg.ScheduleDefinition(
            job=job,
            cron_schedule=settings.cron,
            execution_timezone=settings.timezone,
            name=project.place.name("retrain_schedule"),
            description="Retrains every base model whose data or recipe changed. A model is "
            "released only behind a PASS.",
            execution_fn=requests,
        )


@contextlib.contextmanager
def valid_cron(key: str) -> Iterator[None]:
    """Turn Dagster's error of an invalid time into a ConfigError of this key."""
    try:
        yield
    except dg.DagsterInvalidDefinitionError as error:
        raise ConfigError(
            where=f"finetune.yaml: {key}",
            found=str(error).splitlines()[0],
            expected='a cron expression such as "0 3 * * 1" and a time zone such as Europe/Berlin',
            fix=f"correct {key}.cron or {key}.timezone",
        ) from None
