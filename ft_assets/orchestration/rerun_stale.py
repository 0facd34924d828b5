"""`rerun_stale`: a sensor that asks `ft plan` for each base model what would run, and requests a run of exactly that.

A plan and not Dagster's conditions: what decides a result stands also in finetune.yaml, in the base's files and in the installed
libraries, and of their changes Dagster has no event. All of it is read anew at each tick, as the run that is requested will do.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import dagster as dg

from ft_assets.artifacts import open_store
from ft_assets.artifacts.environment import LIBRARIES, library_versions
from ft_assets.config import Project, find_config, load_project, settings_version
from ft_assets.errors import FtError, InfrastructureFault
from ft_assets.orchestration.automation import AFTER_PEOPLE, content_version
from ft_assets.orchestration.run_plan import MAYBE, REFUSED, REUSED, RUNS, Build, Step, plan

INTERVAL_SECONDS = 60
FINISHED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}
UNDER_WAY = [status for status in dg.DagsterRunStatus if status not in FINISHED]
DECIDES_NOTHING = {
    "base_models",
    "schedule",
    "freshness",
    "alerts",
}  # of finetune.yaml; the base model asked about is added
UNSEEN = "the data files changed, or are seen for the first time; asked when they are still at the next tick"
SOURCES, BOARDS = "before all base models", "after all base models"
Asked = dict[
    str, Any
]  # of one request: `outside`, and `steps`, {asset: its version, None where that was not known yet}


class Look:
    """The graph of one project as it is today, and what is stale in it."""

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
    ) -> tuple[list[Step], list[str]]:
        """Return the steps that would run or may, none if nothing must; and what is refused, with its reason.

        A version that was made before and would only be made current again (a setting taken back) is stale too: it is not what
        the steps below read today.
        """
        store, steps = (
            open_store(self.project),
            plan(self.project, self.build, list(keys), partition),
        )
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

    def first(self, steps: Sequence[Step]) -> list[Step]:
        """Return those that lie below none of the others: their versions are known, all that they are made of is as it will be."""
        moving = {dg.AssetKey(step.asset) for step in steps}
        return [
            step
            for step in steps
            if not self.graph.get_ancestor_asset_keys(dg.AssetKey(step.asset)) & moving
        ]

    def asked(self, steps: Sequence[Step], partition: str | None) -> Asked:
        """Return what is remembered of a request of these steps. `outside`: what decides versions that are not known yet."""
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

    def changed_since(self, before: Asked | None, steps: Sequence[Step], now: Asked) -> bool:
        """Return whether anything has changed since the last request: if not, its run failed, or runs, and would again."""
        if before is None or before["outside"] != now["outside"]:
            return True
        return any(
            before["steps"].get(step.asset, "") not in (None, step.version)
            for step in self.first(steps)
        )

    def request(self, steps: Sequence[Step], partition: str | None) -> dg.RunRequest:
        """Return a run of these steps with their checks, and the blocking checks of what they are made from.

        Those are judged again because a check that failed in an earlier run holds here too, and by today's settings. Not those of
        single base models before what shows them all: it shows also the ones that failed.
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
    """Return the sensor; its runs are runs of `job`, which holds all that is made here."""
    known = set(project.base_models)

    @dg.sensor(
        name="rerun_stale",
        job=job,
        minimum_interval_seconds=INTERVAL_SECONDS,
        description="Reruns what `ft plan` says would run: a run a base model, when data, finetune.yaml, a base or a library changed. "
        "What failed is tried again only after something changed.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        memory: dict[str, Any] = json.loads(context.cursor or '{"data": null, "asked": {}}')
        try:
            look = Look(load_project(find_config(project.root)), build)
            data = content_version(look.project)
            if data != memory["data"]:  # wait until a copy in progress is over
                context.update_cursor(json.dumps({**memory, "data": data}))
                return dg.SkipReason(UNSEEN)
            requests, said = _requests(look, known, _under_way(context.instance), memory["asked"])
        except (FtError, InfrastructureFault) as error:
            return dg.SkipReason(str(error))
        for line in said:
            context.log.info(line)
        reason = None if requests else dg.SkipReason("\n".join(said) or "nothing is stale")
        return dg.SensorResult(run_requests=requests, skip_reason=reason, cursor=json.dumps(memory))

    return sensor


def _in_a_line(why: Sequence[str]) -> str:
    return ("; ".join(why).splitlines() or [REFUSED])[0]


def _under_way(instance: dg.DagsterInstance) -> set[str | None]:
    """Return the base models of which a run has not ended; None stands for a run of no single one."""
    return {
        run.tags.get("dagster/partition")
        for run in instance.get_runs(dg.RunsFilter(statuses=UNDER_WAY))
    }


def _requests(
    look: Look, known: set[str], busy: set[str | None], asked: dict[str, Asked]
) -> tuple[list[dg.RunRequest], list[str]]:
    """Return the runs to request and what is said of them; `asked`, the last request of each part of the graph, is brought up to date.

    First what all base models are made from, when no run is under way that reads it; then the base models, each when no run of
    its own is; then what shows them all, when there is nothing else to do.
    """
    requests, said = list[dg.RunRequest](), list[str]()

    def consider(
        label: str, keys: Iterable[dg.AssetKey], partition: str | None, held: bool
    ) -> bool:
        """Request what is stale, unless that is `held` by a run or was asked for; return whether the part is as it should be."""
        steps, refused = look.stale(keys, partition)
        said.extend(f"{label}: {line}" for line in refused)
        if not steps:
            asked.pop(label, None)
            return not refused
        names, now = ", ".join(step.asset for step in steps), look.asked(steps, partition)
        if held:
            said.append(f"{label}: {names}: waits for the runs under way")
        elif look.changed_since(asked.get(label), steps, now):
            asked[label] = now
            requests.append(look.request(steps, partition))
            said.append(
                f"{label}: {names} ({'; '.join(why for step in look.first(steps) for why in step.why)})"
            )
        else:
            said.append(
                f"{label}: {names}: a run was requested and did not make them; not again before something changes"
            )
        return False

    if not consider(SOURCES, look.sources, None, bool(busy)):
        return requests, said
    for name in look.project.base_models:
        if name not in known:
            said.append(f"{name}: new in finetune.yaml; seen after Reload definitions")
        elif None in busy or name in busy:
            said.append(f"{name}: a run is under way")
        else:
            consider(name, look.partitioned, name, held=False)
    if not requests and not busy:
        consider(BOARDS, look.boards, None, held=False)
    return requests, said
