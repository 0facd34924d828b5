"""`mark_stale` and `up_to_date`: show on each asset what is out of date, for which base, and why.

Dagster's own *Unsynced* mark names no partition, and gets no event when finetune.yaml, a base model
or a library changes. The sensor plans as `ft plan` does after each change, and reports a failed
check `up_to_date` (a warning) for each artifact that a run would make again.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TypedDict

import dagster as dg

from ft_assets.artifacts import open_store
from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.artifacts.environment import LIBRARIES, library_versions
from ft_assets.artifacts.store import CURRENT
from ft_assets.compat.dagster import report_check
from ft_assets.config import Project, reloaded
from ft_assets.errors import FtError, InfrastructureFault
from ft_assets.models.source import source_identity
from ft_assets.orchestration.data_sources import Versions, reported, reports, source_versions
from ft_assets.orchestration.materializer import PARTITION_TAG, user_errors
from ft_assets.orchestration.place import key_of, name_of
from ft_assets.orchestration.run_plan import MAYBE, Build, PlannedStep
from ft_assets.orchestration.stale_graph import StaleGraph, in_a_line, under_way
from ft_assets.screen import screen_of

CHECK = "up_to_date"
INTERVAL_SECONDS = 30
BUDGET_SECONDS = 20.0  # of plans in one tick: Dagster ends a tick after 60 seconds
NOTHING = "made from today's data, settings, base model and code"
NOT_MADE = "may be out of date: the run ended before it came to this"
PLANNED = {
    dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION,
}
Marks = dict[str, dict[str, str]]  # {asset: {base model: why a run of it makes it again}}


class Memory(TypedDict):
    """The sensor's cursor.

    `outside`: a hash of all that decides a plan. `planned`: the hash of the finished plan.
    `pending`: the base models that are not planned yet. `marks`: what the UI shows.
    """

    outside: str
    planned: str
    pending: list[str]
    marks: Marks


START: Memory = {"outside": "", "planned": "", "pending": [], "marks": {}}


def outside(project: Project, data: Versions) -> str:
    """Hash what decides a plan: data, finetune.yaml, bases, libraries and the store's versions.

    The commit of a model of the hub is looked up once an hour.
    """
    store = open_store(project)
    # As bytes: a damaged pointer is a state too.
    current = [
        (*home, store.read_beside(*home, CURRENT)) for home in sorted(store.homes(), key=str)
    ]
    bases = {
        name: {"looked up in hour": int(time.time() // 3600)}  # a plan asks the hub for its commit
        if settings.hub
        else source_identity(name, settings, project.root)
        for name, settings in project.base_models.items()
    }
    libraries = {kind: library_versions(kind) for kind in LIBRARIES}
    settings = project.model_dump(mode="json")
    text = json.dumps([data, settings, bases, libraries, current], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def stale_in(graph: StaleGraph, base_model: str) -> dict[str, str]:
    """Return {asset: why} of the artifacts that a run of one base model would make again.

    Dagster shows an artifact that was never made as missing. It is not out of date.
    """
    steps, refused = graph.stale(graph.graph.materializable_asset_keys, base_model)
    made = {
        step.asset: why(step) for step in steps if graph.store.current(step.asset, step.partition)
    }
    return made | {asset: f"a run would be refused: {text}" for asset, text in refused.items()}


def why(step: PlannedStep) -> str:
    """Return why a planned step is, or may be, out of date, in one line."""
    reason = in_a_line(step.why)
    if step.action == MAYBE:
        return f"may be out of date: made again if this changes: {reason.removeprefix('after ')}"
    return f"out of date: {reason}"


def mark_stale(project: Project, build: Build) -> dg.SensorDefinition:
    """Build the sensor. It is on by default, because it only looks."""
    known = set(project.base_models)

    @dg.sensor(
        name=project.place.name("mark_stale"),
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports changed data sources, and marks what a run would make again: the "
        "check up_to_date of an asset names the base model and the reason. Starts nothing.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        memory: Memory = json.loads(context.cursor) if context.cursor else START
        try:
            today = reloaded(project)
            hashes = ContentHashes(today.root / ".ft" / "hashes.json")
            data = source_versions(today, hashes.of)
            now = outside(today, data)
            if now != memory["outside"]:  # wait until a copy in progress, or a run, is over
                context.update_cursor(json.dumps({**memory, "outside": now}))
                return dg.SkipReason("something changed; looked at when it is still at a tick")
            if now == memory["planned"] and not memory["pending"]:
                return dg.SkipReason("nothing has changed")
            if under_way(today, context.instance):
                return dg.SkipReason("waits for the runs under way")
            if now != memory["planned"]:
                pending = [name for name in today.base_models if name in known]
                memory = {**memory, "planned": now, "pending": pending}
            events = reports(today, data, reported(context.instance, today))
            tick = f"mark_stale-{uuid.uuid4()}"  # in place of a run
            for mark in _planned(StaleGraph(today, build), memory):
                report_check(context.instance, tick, mark)
        except (FtError, InfrastructureFault) as error:
            return dg.SkipReason(str(error))
        except Exception as error:  # the tick fails with one screen of text
            raise dg.Failure(screen_of(error, "the sensor mark_stale")[0]) from None
        return dg.SensorResult(asset_events=events, cursor=json.dumps(memory))

    return sensor


def _planned(graph: StaleGraph, memory: Memory) -> Iterator[dg.AssetCheckEvaluation]:
    """Yield the marks that changed, for as many base models as the budget allows."""
    started = time.monotonic()
    while memory["pending"] and time.monotonic() - started < BUDGET_SECONDS:
        name = memory["pending"].pop(0)
        found = stale_in(graph, name)
        for key in sorted(graph.graph.materializable_asset_keys):
            asset = name_of(key)
            shown = memory["marks"].setdefault(asset, {})
            partition = name if key in graph.partitioned else None
            before = shown.get(name) if partition else _any(shown)
            shown.pop(name, None)
            if asset in found:
                shown[name] = found[asset]
            # An asset without partitions is out of date if it is so for any base model.
            now = shown.get(name) if partition else _any(shown)
            if now != before:
                yield _mark(key, partition, now)


def _any(shown: dict[str, str]) -> str | None:
    return next(iter(shown.values()), None)


def _mark(key: dg.AssetKey, partition: str | None, why: str | None) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=key,
        check_name=CHECK,
        passed=why is None,
        severity=dg.AssetCheckSeverity.WARN,
        description=why or NOTHING,
        partition=partition,
    )


def up_to_date(
    project: Project,
    build: Build,
    assets: Sequence[str],
    partitions: dg.PartitionsDefinition | None,
    name: str,
) -> dg.AssetChecksDefinition:
    """Build the checks of the assets with these partitions, as one op of a run.

    In a run, what it made or kept is up to date. Executed alone, it plans.
    """
    specs = [
        dg.AssetCheckSpec(
            CHECK,
            asset=key_of(project, asset),
            partitions_def=partitions,
            description="A run would not make it again: data, finetune.yaml, base model, code and "
            "libraries are those that it was made from.",
        )
        for asset in assets
    ]

    @dg.multi_asset_check(specs=specs, name=project.place.name(name), can_subset=True)
    def judge(
        context: dg.AssetCheckExecutionContext,
    ) -> Iterator[dg.AssetCheckResult]:
        base_model = context.partition_key if partitions else None
        chosen = {key.asset_key for key in context.selected_asset_check_keys}
        with user_errors(project):
            made = _made_by(context.instance, context.run.run_id)
            planned: dict[str, str] = {}
            if not chosen <= made:
                graph = StaleGraph.today(project, build)
                planned = stale_in(graph, base_model or next(iter(graph.project.base_models)))
            for key in sorted(chosen):
                found = None if key in made else planned.get(name_of(key))
                yield dg.AssetCheckResult(
                    asset_key=key,
                    check_name=CHECK,
                    passed=found is None,
                    severity=dg.AssetCheckSeverity.WARN,
                    description=found or NOTHING,
                )

    return judge


def settle(instance: dg.DagsterInstance, run_id: str) -> None:
    """Judge the checks `up_to_date` that a run planned and, because a step failed, did not execute.

    The UI would show each asset of the run as failed, also those that the run has made.
    """
    run = instance.get_run_by_id(run_id)
    logs = instance.all_logs(run_id, of_type=PLANNED)
    events = [event.dagster_event for event in logs if event.dagster_event is not None]
    evaluated = {
        event.asset_check_evaluation_data.asset_check_key
        for event in events
        if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    }
    made = _made_by(instance, run_id)
    for event in events:
        if event.event_type != dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED:
            continue
        planned = event.asset_check_planned_data
        key = planned.asset_check_key
        if key.name != CHECK or key in evaluated or run is None:
            continue
        partition = run.tags.get(PARTITION_TAG) if planned.partitions_subset else None
        why = None if key.asset_key in made else NOT_MADE
        report_check(instance, run_id, _mark(key.asset_key, partition, why))


def _made_by(instance: dg.DagsterInstance, run_id: str) -> set[dg.AssetKey]:
    """Return the assets that a run has materialized so far."""
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    return {key for event in events if (key := event.get_dagster_event().asset_key)}
