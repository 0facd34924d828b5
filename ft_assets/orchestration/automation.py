"""Automation: a sensor that reports changed data files, the retraining schedule, the alerts.

All of these are off by default. Another sensor makes the leaderboard after a failure. The sensor
that reruns what is stale is in `ft_assets.orchestration.rerun_stale`.
"""

import datetime
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import dagster as dg

from ft_assets.config import FreshnessSettings, Project, ScheduleSettings
from ft_assets.data.content import CONVERSATIONS, data_content
from ft_assets.errors import ConfigError, FtError, InfrastructureFault
from ft_assets.orchestration.alerts import alert_sensors

KEYS = (*CONVERSATIONS, "preferences")
# These age for a user if nothing retrains.
PROVEN = {dg.AssetKey("eval_report"), dg.AssetKey("merged_model")}
DATA_FILES = dg.AssetKey("data_files")
BOARD, RETRAIN = dg.AssetKey("leaderboard"), "retrain"
# Automatic runs queue behind the runs that a person started.
AFTER_PEOPLE = {"dagster/priority": "-1"}


def freshness(settings: FreshnessSettings | None, key: dg.AssetKey) -> dg.FreshnessPolicy | None:
    """Return the policy that marks a report or a merged model as overdue.

    A run that reuses the artifact counts, because it verified that nothing changed.
    """
    if settings is None or key not in PROVEN:
        return None
    warn, fail = (
        datetime.timedelta(hours=hours)
        for hours in (settings.warn_after_hours, settings.fail_after_hours)
    )
    return dg.FreshnessPolicy.time_window(fail_window=fail, warn_window=warn)


def content_version(project: Project) -> str:
    """Hash the content of all data files, independent of their names and order."""
    hashes = {
        key: sorted(digest for _, digest in files)
        for key, files in data_content(project, KEYS).items()
    }
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:20]


def automation(
    project: Project, base_models: dg.PartitionsDefinition
) -> tuple[list[dg.ScheduleDefinition], list[dg.SensorDefinition], list]:
    """Return (schedules, sensors, jobs)."""

    @dg.sensor(
        name="data_files_sensor",
        minimum_interval_seconds=30,
        description="Reports a new version of data_files when their content changed and then "
        "stayed the same for one tick.",
    )
    def data_files_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            version = content_version(project)
        except (FtError, InfrastructureFault) as error:
            return dg.SkipReason(str(error))
        seen, reported = json.loads(context.cursor or '["", ""]')
        if version == reported:
            return dg.SkipReason("the data files have not changed")
        if version != seen:  # wait until a copy in progress is over
            context.update_cursor(json.dumps([version, reported]))
            return dg.SkipReason(
                "the data files changed; reported when they are still at the next tick"
            )
        # A materialization, not an observation: after an observation of a plain spec, downstream
        # assets stay stale for ever.
        event = dg.AssetMaterialization(DATA_FILES, tags={"dagster/data_version": version})
        return dg.SensorResult(asset_events=[event], cursor=json.dumps([version, version]))

    retrain = dg.define_asset_job(
        RETRAIN,
        selection=dg.AssetSelection.all() - dg.AssetSelection.assets(DATA_FILES),
        partitions_def=base_models,
        description="All assets of one base model. Steps whose inputs did not change are reused.",
    )
    schedules = [_schedule(project, project.schedule, retrain)] if project.schedule else []
    board = _leaderboard_after_failure(retrain)
    return schedules, [data_files_sensor, board, *alert_sensors(project.alerts)], [retrain]


def _leaderboard_after_failure(job: Any) -> dg.SensorDefinition:
    """Build the sensor that makes the leaderboard after a failed run.

    The failed run skips the leaderboard, because it is below the failed step, and it would go on
    showing the former verdict. The sensor is on by default: it only follows runs that a person or
    another sensor started.
    """

    @dg.run_failure_sensor(
        name="leaderboard_after_failure",
        request_job=job,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Makes the leaderboard after a failed run that should have made it, so that it "
        "shows the failure.",
    )
    def sensor(context: dg.RunFailureSensorContext) -> dg.RunRequest | dg.SkipReason:
        run = context.dagster_run
        chosen = run.asset_selection or (
            frozenset() if run.job_name != RETRAIN else None
        )  # None: all that the job makes
        if chosen is not None and (BOARD not in chosen or chosen == {BOARD}):
            return dg.SkipReason("the run was not to make the leaderboard, or nothing else")
        return dg.RunRequest(
            run_key=run.run_id,
            asset_selection=[BOARD],
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
            yield dg.RunRequest(
                run_key=f"{at}-{name}", partition_key=name, tags={"ft/base_model": name, **tags}
            )

    try:
        return dg.ScheduleDefinition(
            job=job,
            cron_schedule=settings.cron,
            execution_timezone=settings.timezone,
            name="retrain_schedule",
            description="Retrains every base model whose data or recipe changed. A model is "
            "released only behind a PASS.",
            execution_fn=requests,
        )
    except dg.DagsterInvalidDefinitionError as error:
        raise ConfigError(
            where="finetune.yaml: schedule",
            found=str(error).splitlines()[0],
            expected='a cron expression such as "0 3 * * 1" and a time zone such as Europe/Berlin',
            fix="correct schedule.cron or schedule.timezone",
        ) from None
