"""`rerun_stale`: a sensor that plans each base model as `ft plan` does, and requests that run.

It uses our own plan instead of Dagster's AutomationConditions, because Dagster gets no event when
finetune.yaml, a base model or a library changes. Each tick reads all of them again, as the
requested run does.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import dagster as dg

from ft_assets.artifacts import open_store
from ft_assets.artifacts.environment import LIBRARIES, library_versions
from ft_assets.config import Project, find_config, load_project, settings_version
from ft_assets.errors import FtError, InfrastructureFault
from ft_assets.orchestration.automation import AFTER_PEOPLE, content_version
from ft_assets.orchestration.run_plan import MAYBE, REFUSED, REUSED, RUNS, Build, PlannedStep, plan

INTERVAL_SECONDS = 60
FINISHED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}
UNDER_WAY = [status for status in dg.DagsterRunStatus if status not in FINISHED]
# Sections of finetune.yaml that decide no content. The planned base model is added to the rest.
DECIDES_NOTHING = {"base_models", "schedule", "freshness", "alerts"}
UNSEEN = (
    "the data files changed, or are seen for the first time; "
    "planned when they do not change until the next tick"
)
SOURCES, BOARDS = "before all base models", "after all base models"


class Request(TypedDict):
    """A requested run. `outside`: a hash of what decides the versions that are not known yet.

    `steps`: {asset: its version, None if it was not known yet}.
    """

    outside: str
    steps: dict[str, str | None]


class Memory(TypedDict):
    """The sensor's cursor. `data`: the version of the data files. `asked`: {part: last request}."""

    data: str | None
    asked: dict[str, Request]


class StaleGraph:
    """Today's graph of one project, and what is stale in it."""

    def __init__(self, project: Project, build: Build) -> None:
        self.project, self.build = project, build
        self.graph = build(project).resolve_asset_graph()
        made = self.graph.materializable_asset_keys
        self.partitioned = {key for key in made if self.graph.get(key).is_partitioned}
        fed = {
            key
            for key in made - self.partitioned
            if self.graph.get_ancestor_asset_keys(key) & self.partitioned
        }
        self.sources, self.boards = made - self.partitioned - fed, fed

    def stale(
        self, keys: Iterable[dg.AssetKey], partition: str | None
    ) -> tuple[list[PlannedStep], list[str]]:
        """Return the steps that would or may run, and the refused ones with their reasons.

        No steps if nothing must run. A version that would only become current again (a setting was
        taken back) is stale too: the steps below do not read it today.
        """
        store = open_store(self.project)
        steps = plan(self.project, self.build, list(keys), partition)
        again = {
            step.asset
            for step in steps
            if step.version not in (None, store.current_name(step.asset, partition))
        }
        must = [
            step
            for step in steps
            if step.action == RUNS or (step.action == REUSED and step.asset in again)
        ]
        may = [step for step in steps if step in must or step.action == MAYBE]
        return may if must else [], [
            f"{step.asset}: {_in_a_line(step.why)}" for step in steps if step.action == REFUSED
        ]

    def first(self, steps: Sequence[PlannedStep]) -> list[PlannedStep]:
        """Return the steps below none of the others. Their versions are known: no input changes."""
        moving = {dg.AssetKey(step.asset) for step in steps}
        return [
            step
            for step in steps
            if not self.graph.get_ancestor_asset_keys(dg.AssetKey(step.asset)) & moving
        ]

    def remembered(self, steps: Sequence[PlannedStep], partition: str | None) -> Request:
        """Return the record that the sensor keeps of a request of these steps."""
        settings = self.project.model_dump(mode="json", exclude=DECIDES_NOTHING)
        own = self.project.base_models[partition].model_dump(mode="json") if partition else None
        libraries = {kind: library_versions(kind) for kind in LIBRARIES}
        code = {
            key.to_user_string(): self.graph.get(key).code_version
            for key in self.graph.materializable_asset_keys
        }
        first = {step.asset for step in self.first(steps)}
        return {
            "outside": settings_version([settings, own, libraries, code]),
            "steps": {step.asset: step.version if step.asset in first else None for step in steps},
        }

    def changed_since(
        self, before: Request | None, steps: Sequence[PlannedStep], now: Request
    ) -> bool:
        """Return True if anything changed since the last request.

        If not, its run failed or still runs, and another run would do the same.
        """
        if before is None or before["outside"] != now["outside"]:
            return True
        return any(
            before["steps"].get(step.asset, "") not in (None, step.version)
            for step in self.first(steps)
        )

    def request(self, steps: Sequence[PlannedStep], partition: str | None) -> dg.RunRequest:
        """Request a run of these steps, their checks, and the blocking checks of their inputs.

        The inputs are checked again because a check that failed in an earlier run counts here too,
        by today's settings. The leaderboard runs without the checks of single base models, because
        it also shows those that failed.
        """
        chosen = {dg.AssetKey(step.asset) for step in steps}
        above = {parent for key in chosen for parent in self.graph.get(key).parent_keys}
        above -= set() if partition else self.partitioned
        checks = [
            check
            for check in self.graph.asset_check_keys
            if check.asset_key in chosen
            or (check.asset_key in above and self.graph.get(check).blocking)
        ]
        tags = {
            "ft/started_by": "rerun_stale",
            **AFTER_PEOPLE,
            **({"ft/base_model": partition} if partition else {}),
        }
        return dg.RunRequest(
            partition_key=partition,
            asset_selection=sorted(chosen),
            asset_check_keys=checks,
            tags=tags,
        )


def rerun_stale(project: Project, build: Build, job: Any) -> dg.SensorDefinition:
    """Build the sensor. It requests runs of `job`, which has every materializable asset."""
    known = set(project.base_models)

    @dg.sensor(
        name="rerun_stale",
        job=job,
        minimum_interval_seconds=INTERVAL_SECONDS,
        description="Reruns what `ft plan` shows as stale, with one run for each base model, when "
        "data, finetune.yaml, a base or a library changed. A failed run is repeated only after "
        "another change.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        memory: Memory = json.loads(context.cursor or '{"data": null, "asked": {}}')
        try:
            graph = StaleGraph(load_project(find_config(project.root)), build)
            data = content_version(graph.project)
            if data != memory["data"]:  # wait until a copy in progress is over
                context.update_cursor(json.dumps({**memory, "data": data}))
                return dg.SkipReason(UNSEEN)
            busy = _under_way(context.instance)
            requests, notes = _requests(graph, known, busy, memory["asked"])
        except (FtError, InfrastructureFault) as error:
            return dg.SkipReason(str(error))
        for line in notes:
            context.log.info(line)
        reason = None if requests else dg.SkipReason("\n".join(notes) or "nothing is stale")
        return dg.SensorResult(run_requests=requests, skip_reason=reason, cursor=json.dumps(memory))

    return sensor


def _in_a_line(why: Sequence[str]) -> str:
    return ("; ".join(why).splitlines() or [REFUSED])[0]


def _under_way(instance: dg.DagsterInstance) -> set[str | None]:
    """Return the base models with an unfinished run. None is a run without a base model."""
    return {
        run.tags.get("dagster/partition")
        for run in instance.get_runs(dg.RunsFilter(statuses=UNDER_WAY))
    }


def _requests(
    graph: StaleGraph, known: set[str], busy: set[str | None], asked: dict[str, Request]
) -> tuple[list[dg.RunRequest], list[str]]:
    """Return the runs to request and notes about them. Updates `asked`.

    First come the assets that all base models read, if no run is under way. Then each base model,
    if no run of its own is under way. Then the assets that show all base models, if there is
    nothing else to do.
    """
    requests: list[dg.RunRequest] = []
    notes: list[str] = []

    def consider(
        label: str, keys: Iterable[dg.AssetKey], partition: str | None, held: bool
    ) -> bool:
        """Request what is stale, unless a run holds it or it was requested before.

        Return True if the part is up to date.
        """
        steps, refused = graph.stale(keys, partition)
        notes.extend(f"{label}: {line}" for line in refused)
        if not steps:
            asked.pop(label, None)
            return not refused
        names = ", ".join(step.asset for step in steps)
        now = graph.remembered(steps, partition)
        if held:
            notes.append(f"{label}: {names}: waits for the runs under way")
        elif graph.changed_since(asked.get(label), steps, now):
            asked[label] = now
            requests.append(graph.request(steps, partition))
            why = "; ".join(reason for step in graph.first(steps) for reason in step.why)
            notes.append(f"{label}: {names} ({why})")
        else:
            notes.append(
                f"{label}: {names}: a run was requested and did not make them; "
                "not again before something changes"
            )
        return False

    if not consider(SOURCES, graph.sources, None, bool(busy)):
        return requests, notes
    for name in graph.project.base_models:
        if name not in known:
            notes.append(f"{name}: new in finetune.yaml; seen after Reload definitions")
        elif None in busy or name in busy:
            notes.append(f"{name}: a run is under way")
        else:
            consider(name, graph.partitioned, name, held=False)
    if not requests and not busy:
        consider(BOARDS, graph.boards, None, held=False)
    return requests, notes
