"""What runs without a person: a sensor that reports changed data files, and the retraining schedule. Both off by default."""

import hashlib
import json

import dagster as dg

from ft_assets.assets.data import CONVERSATIONS, data_content, data_files
from ft_assets.config import Project
from ft_assets.errors import FtError

KEYS = (*CONVERSATIONS, "preferences")


def content_version(project: Project) -> str:
    """Return the hash of all data files' content, whatever their names and order."""
    hashes = {key: sorted(digest for _, digest in files) for key, files in data_content(project, KEYS).items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:20]


def automation(
    project: Project, base_models: dg.PartitionsDefinition
) -> tuple[list[dg.ScheduleDefinition], list[dg.SensorDefinition], list]:
    """Return (schedules, sensors, jobs)."""

    @dg.sensor(
        name="data_files_sensor",
        minimum_interval_seconds=30,
        description="Reports a new version of data_files when their content changes and has been still for one tick.",
    )
    def data_files_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            version = content_version(project)
        except FtError as error:
            return dg.SkipReason(str(error))
        seen, reported = json.loads(context.cursor or '["", ""]')
        if version == reported:
            return dg.SkipReason("the data files have not changed")
        if version != seen:  # wait until a copy in progress is over
            context.update_cursor(json.dumps([version, reported]))
            return dg.SkipReason("the data files changed; reported when they are still at the next tick")
        # A materialization, not an observation: after an observation of a plain spec, downstream stays stale for ever.
        event = dg.AssetMaterialization(data_files.key, tags={"dagster/data_version": version})
        return dg.SensorResult(asset_events=[event], cursor=json.dumps([version, version]))

    retrain = dg.define_asset_job(
        "retrain",
        selection=dg.AssetSelection.all() - dg.AssetSelection.assets(data_files.key),
        partitions_def=base_models,
        description="Everything of one base model; steps whose inputs did not change are reused.",
    )
    schedules = []
    if project.schedule is not None:

        @dg.schedule(
            job=retrain,
            cron_schedule=project.schedule.cron,
            execution_timezone=project.schedule.timezone,
            name="retrain_schedule",
            description="Retrains every base model whose data or recipe changed; releases only behind a PASS.",
        )
        def retrain_schedule(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest]:
            return [
                dg.RunRequest(
                    run_key=f"{context.scheduled_execution_time.isoformat()}-{name}", partition_key=name, tags={"ft/base_model": name}
                )
                for name in project.base_models
            ]

        schedules.append(retrain_schedule)
    return schedules, [data_files_sensor], [retrain]
