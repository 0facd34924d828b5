"""What runs without a person, all of it off by default: a sensor that reports changed data files, one that reruns what is
stale, the retraining schedule, and the alerts."""

import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import dagster as dg

from ft_assets.alerts import alert_sensors
from ft_assets.assets.data import CONVERSATIONS, data_content, data_files
from ft_assets.config import FreshnessSettings, Project, ScheduleSettings
from ft_assets.errors import ConfigError, FtError

KEYS = (*CONVERSATIONS, "preferences")
PROVEN = {dg.AssetKey("eval_report"), dg.AssetKey("merged_model")}  # what goes stale for a user when nothing retrains
AFTER_PEOPLE = {"dagster/priority": "-1"}  # runs that nobody waits for stand behind those that somebody started


def stale(ancestors: Iterable[dg.AssetKey]) -> dg.AutomationCondition:
    """Condition of every asset: what it is made from has other content than when it was made, and is ready.

    Content, not time: `eager()` retrains when an input was made again with the same result. It waits while any of the
    partitioned `ancestors` runs or is about to: few-shot examples and train rows come from one asset, and a report on new
    examples and an adapter that is about to be replaced would cost an evaluation for nothing. A failed blocking check holds
    across runs here.
    """
    condition: Any = dg.AutomationCondition  # its key type is invariant, which the | of its own conditions does not meet
    moved = condition.data_version_changed() & ~condition.executed_with_root_target()
    wanted = (condition.any_deps_match(moved) | condition.code_version_changed() | condition.newly_missing()).since_last_handled()
    moving = condition.in_progress() | condition.will_be_requested()
    busy = condition.any_deps_match(moving) | condition.in_progress()
    for key in sorted(ancestors):
        busy |= condition.asset_matches(key, moving)
    return (wanted & ~busy & ~condition.any_deps_missing() & condition.all_deps_blocking_checks_passed()).with_label("stale and ready")


def automated(specs: Iterable[dg.AssetSpec]) -> Mapping[dg.AssetKey, dg.AutomationCondition]:
    """Return the condition of each asset that is made here."""
    known = {spec.key: spec for spec in specs}

    def above(key: dg.AssetKey) -> set[dg.AssetKey]:
        parents = {dep.asset_key for dep in known[key].deps}
        return parents.union(*(above(parent) for parent in parents))

    partitioned = {key for key, spec in known.items() if spec.partitions_def is not None}
    return {key: stale(above(key) & partitioned if key in partitioned else ()) for key in known if key != data_files.key}


def freshness(settings: FreshnessSettings | None, key: dg.AssetKey) -> dg.FreshnessPolicy | None:
    """Return when a report or a merged model is overdue; a run that reuses it counts, for it has looked that nothing changed."""
    if settings is None or key not in PROVEN:
        return None
    warn, fail = (datetime.timedelta(hours=hours) for hours in (settings.warn_after_hours, settings.fail_after_hours))
    return dg.FreshnessPolicy.time_window(fail_window=fail, warn_window=warn)


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
    schedules = [_schedule(project, project.schedule, retrain)] if project.schedule else []
    rerun = dg.AutomationConditionSensorDefinition(
        "rerun_stale",
        target=dg.AssetSelection.all(),
        minimum_interval_seconds=30,
        run_tags={"ft/started_by": "rerun_stale", **AFTER_PEOPLE},
        description="Reruns each asset whose inputs changed in content, partition by partition, one step of the graph at a time.",
    )
    return schedules, [data_files_sensor, rerun, *alert_sensors(project.alerts)], [retrain]


def _schedule(project: Project, settings: ScheduleSettings, job: Any) -> dg.ScheduleDefinition:
    """Return the schedule: a run a base model at each tick. Raises ConfigError for a time that cannot be."""

    def requests(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
        tags = {"ft/started_by": "retrain_schedule", **AFTER_PEOPLE}
        at = context.scheduled_execution_time.isoformat()
        for name in project.base_models:
            yield dg.RunRequest(run_key=f"{at}-{name}", partition_key=name, tags={"ft/base_model": name, **tags})

    try:
        return dg.ScheduleDefinition(
            job=job,
            cron_schedule=settings.cron,
            execution_timezone=settings.timezone,
            name="retrain_schedule",
            description="Retrains every base model whose data or recipe changed; releases only behind a PASS.",
            execution_fn=requests,
        )
    except dg.DagsterInvalidDefinitionError as error:
        found, expected = str(error).splitlines()[0], 'a cron expression such as "0 3 * * 1" and a time zone such as Europe/Berlin'
        raise ConfigError("finetune.yaml: schedule", found, expected, "correct it") from None
