"""Today's graph of a project, what is out of date in it, and the run that would mend it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import dagster as dg

from ft_assets.artifacts.environment import LIBRARIES, library_versions
from ft_assets.config import Project, reloaded, settings_version
from ft_assets.orchestration.place import concerns, key_of, name_of
from ft_assets.orchestration.run_plan import MAYBE, REFUSED, REUSED, RUNS, Build, PlannedStep, Plans

FINISHED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}
UNDER_WAY = [status for status in dg.DagsterRunStatus if status not in FINISHED]
# Sections of finetune.yaml that decide no content. The planned base model is added to the rest.
DECIDES_NOTHING = {"base_models", "schedule", "verify", "freshness", "alerts"}


class Request(TypedDict):
    """A requested run. `outside`: a hash of what decides the versions that are not known yet.

    `steps`: {asset: its version, None if it was not known yet}.
    """

    outside: str
    steps: dict[str, str | None]


class StaleGraph:
    """Today's graph of one project, and what is stale in it."""

    def __init__(self, project: Project, build: Build) -> None:
        self.project, self._plans = project, Plans(project, build)
        self.graph, self.store = self._plans.graph, self._plans.store
        made = self.graph.materializable_asset_keys
        self.partitioned = {key for key in made if self.graph.get(key).is_partitioned}
        fed = {
            key
            for key in made - self.partitioned
            if self.graph.get_ancestor_asset_keys(key) & self.partitioned
        }
        self.sources, self.boards = made - self.partitioned - fed, fed

    @classmethod
    def today(cls, project: Project, build: Build) -> "StaleGraph":
        """Return the graph by the project's finetune.yaml as it is now. Raises ConfigError."""
        return cls(reloaded(project), build)

    def stale(
        self, keys: Iterable[dg.AssetKey], partition: str | None
    ) -> tuple[list[PlannedStep], dict[str, str]]:
        """Return the steps that would or may run, and {asset: why} of the refused ones.

        No steps if nothing must run. A version that would only become current again (a setting was
        taken back) is stale too: the steps below do not read it today.
        """
        steps = self._plans.of(list(keys), partition)
        again = {
            step.asset
            for step in steps
            if step.version not in (None, self.store.current_name(step.asset, step.partition))
        }
        must = [
            step
            for step in steps
            if step.action == RUNS or (step.action == REUSED and step.asset in again)
        ]
        may = [step for step in steps if step in must or step.action == MAYBE]
        refused = {step.asset: in_a_line(step.why) for step in steps if step.action == REFUSED}
        return may if must else [], refused

    def first(self, steps: Sequence[PlannedStep]) -> list[PlannedStep]:
        """Return the steps below none of the others. Their versions are known: no input changes."""
        moving = {key_of(self.project, step.asset) for step in steps}
        return [
            step
            for step in steps
            if not self.graph.get_ancestor_asset_keys(key_of(self.project, step.asset)) & moving
        ]

    def remembered(self, steps: Sequence[PlannedStep], partition: str | None) -> Request:
        """Return the record that the sensor keeps of a request of these steps."""
        settings = self.project.model_dump(mode="json", exclude=DECIDES_NOTHING)
        own = self.project.base_models[partition].model_dump(mode="json") if partition else None
        libraries = {kind: library_versions(kind) for kind in LIBRARIES}
        code = {
            name_of(key): self.graph.get(key).code_version
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

    def request(
        self,
        assets: Iterable[str],
        partition: str | None,
        tags: Mapping[str, str],
        run_key: str | None = None,
    ) -> dg.RunRequest:
        """Request a run of these assets, their checks, and the blocking checks of their inputs.

        The inputs are checked again because a check that failed in an earlier run counts here too,
        by today's settings. The leaderboard runs without the checks of single base models, because
        it also shows those that failed.
        """
        chosen = {key_of(self.project, asset) for asset in assets}
        above = {parent for key in chosen for parent in self.graph.get(key).parent_keys}
        above -= set() if partition else self.partitioned
        checks = [
            check
            for check in self.graph.asset_check_keys
            if check.asset_key in chosen
            or (check.asset_key in above and self.graph.get(check).blocking)
        ]
        return dg.RunRequest(
            run_key=run_key,
            partition_key=partition,
            asset_selection=sorted(chosen),
            asset_check_keys=checks,
            tags=dict(tags),
        )


def in_a_line(why: Sequence[str]) -> str:
    """Return the first line of the reasons of a step."""
    return ("; ".join(why).splitlines() or [REFUSED])[0]


def under_way(project: Project, instance: dg.DagsterInstance) -> set[str | None]:
    """Return the base models with an unfinished run. None is a run without a base model."""
    return {
        run.tags.get("dagster/partition")
        for run in instance.get_runs(dg.RunsFilter(statuses=UNDER_WAY))
        if concerns(project, run, instance)
    }
