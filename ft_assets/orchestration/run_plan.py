"""Predict what a run would do, and why: walk the graph with a materializer that makes nothing.

It compares fingerprints. A step below one that would run is compared with today's versions: it runs
if the content of the step above changes. Times and memory are those of the step's last run.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import dagster as dg

from ft_assets.artifacts import Artifact, open_store
from ft_assets.artifacts.store import Turn
from ft_assets.artifacts.verification import HISTORIES
from ft_assets.config import Project
from ft_assets.errors import ArtifactError
from ft_assets.job import StepSettings
from ft_assets.orchestration.assuming_store import AssumingStore
from ft_assets.orchestration.console import cause
from ft_assets.orchestration.materializer import Finish, Inputs, Make, Materializer, Wanted
from ft_assets.orchestration.memory_forecast import Forecast, forecast

RUNS, MAYBE, REUSED, REFUSED, STOPPED = (
    "runs",
    "runs if that changes",
    "reused",
    "refused",
    "not reached",
)
Build = Callable[[Project], dg.Definitions]


@dataclass(frozen=True)
class PlannedStep:
    """What would happen to one asset.

    `seconds` and `memory_gb` are those of the last run, None if it never ran. `predicted_gb` is the
    memory plan's, None if its inputs or the GPU are not known yet. `version` is the fingerprint by
    today's inputs, None if it cannot be computed.
    """

    asset: str
    partition: str | None
    action: str
    why: list[str]
    seconds: float | None = None
    memory_gb: float | None = None
    predicted_gb: float | None = None
    version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Planner:
    """The Materializer that makes nothing and records what a run would make."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.store = AssumingStore(open_store(project))
        self.steps: dict[str, PlannedStep] = {}
        self.versions: dict[str, str] = {}

    def materialize(
        self,
        context: dg.AssetExecutionContext,
        *,
        identity: Any,
        inputs: Inputs | None = None,
        libraries: str | None = None,
        step: StepSettings | Callable[[], StepSettings] | None = None,
        make: Make | None = None,
        finish: Finish | None = None,
        space: int = 0,
        unread: Collection[str] = (),
        turn: Turn | None = None,
    ) -> tuple[Artifact, bool]:
        """Record whether the artifact would be made, and return the current one.

        Raises dg.Failure if there is none.
        """
        wanted = Wanted.of(context, identity, inputs or {}, libraries)
        self.versions[wanted.asset] = wanted.fingerprint
        current = self._current(wanted)
        known, damage = self._known(wanted)
        above = sorted(
            {name.partition("#")[0].partition("[")[0] for name in wanted.inputs}
            & {name for name, step in self.steps.items() if step.action in (RUNS, MAYBE)}
        )
        if damage is not None:
            action, why = RUNS, [f"{damage.where} {damage.found}"]
        elif known is None:
            action, why = RUNS, reasons(wanted, current)
        elif above:
            action, why = MAYBE, [f"after {', '.join(above)}"]
        else:
            action, why = REUSED, [] if current == known else ["made before; taken again"]
        if known is not None:  # the steps below read what the run would make current
            self.store.assume(known, wanted.partition)
        shown = known or current
        seconds = round(shown.manifest.seconds, 1) if shown else None
        memory = shown.metrics.get("peak_train_memory_gb") if shown else None
        ahead = (
            forecast(self.project, self.store, wanted.asset, wanted.partition)
            if action != REUSED
            else Forecast()
        )
        if ahead.refused:
            action, why = REFUSED, [ahead.refused]
        self.steps[wanted.asset] = PlannedStep(
            wanted.asset,
            wanted.partition,
            action,
            why + ([ahead.note] if ahead.note else []),
            seconds,
            memory,
            ahead.peak_gb,
        )
        if shown is None:
            raise dg.Failure(description=NOT_YET)
        return shown, True

    def _current(self, wanted: Wanted) -> Artifact | None:
        try:
            return self.store.current(wanted.asset, wanted.partition)
        except ArtifactError:  # its manifest cannot be read: _known has the reason
            return None

    def _known(self, wanted: Wanted) -> tuple[Artifact | None, ArtifactError | None]:
        """Return the version if the store has it, and what is wrong with it.

        A version of an object store is not fetched for a plan. Raises the ArtifactError of a
        damaged history.
        """
        known = None
        try:
            known = self.store.find(wanted.asset, wanted.partition, wanted.fingerprint)
            if known is not None and known.fetch is None:
                self.store.verified(known)
        except ArtifactError as error:
            if wanted.asset in HISTORIES:
                raise
            return known, error
        return known, None

    def keep(
        self, context: dg.AssetExecutionContext, artifact: Artifact, above: Sequence[str], why: str
    ) -> tuple[Artifact, bool]:
        """Record that there is nothing to do, unless an asset in `above` would change."""
        moving = sorted(
            name
            for name in above
            if name in self.steps and self.steps[name].action in (RUNS, MAYBE)
        )
        partition = artifact.manifest.partition
        action, reason = (MAYBE, [f"after {', '.join(moving)}"]) if moving else (REUSED, [])
        self.steps[artifact.asset] = PlannedStep(artifact.asset, partition, action, reason)
        return artifact, True


NOT_YET = "would be made for the first time"


def reasons(wanted: Wanted, current: Artifact | None) -> list[str]:
    """List the differences between what is wanted and the current version."""
    if current is None:
        return ["never made"]
    was, found = current.manifest, list[str]()
    if was.code_version != wanted.code_version:
        found.append(f"its code changed (version {was.code_version} → {wanted.code_version})")
    found += [f"{name} changed" for name in _changed(was.inputs, wanted.inputs)]
    found += [
        f"{name} {was.environment.get(name, '–')} → {wanted.environment.get(name, '–')}"
        for name in _changed(was.environment, wanted.environment)
    ]
    before, now = _files(was.settings), _files(wanted.settings)
    found += [
        f"{key}: {_moved(before.get(key, {}), now.get(key, {}))}" for key in _changed(before, now)
    ]
    found += [f"setting {path}" for path in _paths(was.settings, wanted.settings)]
    return found or ["an older version of it is current"]


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]


def _files(settings: Any) -> dict[str, dict[str, str]]:
    """Return {key of data: {file: hash of its content}} of the assets that read data files."""
    found = settings.get("files") if isinstance(settings, Mapping) else None
    return {key: dict(files) for key, files in (found or {}).items()}


def _moved(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Name the files that changed, such as `data/pairs.jsonl changed`, at most three."""
    if sorted(before.values()) == sorted(now.values()):
        return "files have other names"
    words = [
        f"{name} {'removed' if name not in now else 'changed' if name in before else 'added'}"
        for name in _changed(before, now)
    ]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _paths(before: Any, now: Any, prefix: str = "") -> list[str]:
    """List the settings that differ, such as `sft.learning_rate 0.1 → 0.2`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            text
            for key in _changed(before, now)
            if prefix or key != "files"
            for text in _paths(
                before.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key)
            )
        ]
    shown = [str(value) if len(str(value)) < 40 else "…" for value in (before, now)]
    return [f"{prefix} {shown[0]} → {shown[1]}" if shown[0] != shown[1] else prefix]


def _silent(_: dg.InitLoggerContext) -> logging.Logger:
    logger = logging.getLogger("ft.plan.silent")
    # Without a handler, Python's last resort prints errors with their traces.
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False
    return logger


def plan(
    project: Project, build: Build, keys: Sequence[dg.AssetKey], partition: str | None
) -> list[PlannedStep]:
    """Plan a step for each asset of `keys`, in the graph's order."""
    # A server that does not answer is reported at once, not retried.
    once = project.launcher.model_copy(update={"retries": 0})
    planner = Planner(project.model_copy(update={"launcher": once}))
    materializer: Materializer = planner
    definitions = build(project)
    selection = dg.AssetSelection.assets(*keys).without_checks()
    job = dg.Definitions(
        assets=definitions.assets,
        resources={"materializer": materializer},
        executor=dg.in_process_executor,
        jobs=[dg.define_asset_job("plan", selection=selection)],
        loggers={"console": dg.LoggerDefinition(_silent)},
    ).resolve_job_def("plan")
    with dg.DagsterInstance.ephemeral() as instance:
        quiet = {"loggers": {"console": {}}}
        outcome = job.execute_in_process(
            instance=instance, partition_key=partition, raise_on_error=False, run_config=quiet
        )
    refused = {
        event.step_key: cause(event) for event in outcome.all_events if event.is_step_failure
    }
    graph, steps = definitions.resolve_asset_graph(), dict[str, PlannedStep]()
    for key in (
        key
        for level in graph.toposorted_asset_keys_by_level
        for key in sorted(level)
        if key in keys
    ):
        name = key.to_user_string()
        parents = sorted(
            {parent.to_user_string() for parent in graph.get(key).parent_keys} & steps.keys()
        )
        above = [parent for parent in parents if steps[parent].action in (RUNS, MAYBE)]
        stopped = [parent for parent in parents if steps[parent].action in (REFUSED, STOPPED)]
        if stopped:
            steps[name] = PlannedStep(name, partition, STOPPED, [f"after {', '.join(stopped)}"])
        elif name in planner.steps:
            steps[name] = replace(planner.steps[name], version=planner.versions.get(name))
        elif above:  # not reached, or refused with the artifacts of today
            there = (
                name in refused
                or planner.store.current(name, partition if graph.get(key).is_partitioned else None)
                is not None
            )
            steps[name] = PlannedStep(
                name, partition, MAYBE if there else RUNS, [f"after {', '.join(above)}"]
            )
        else:
            steps[name] = PlannedStep(name, partition, REFUSED, [refused.get(name, "")])
    return list(steps.values())


def table(steps: Sequence[PlannedStep]) -> str:
    """Format the steps as text, with the time that they took."""
    wide = max(len(step.asset) for step in steps)
    lines = [
        f"  {step.asset:<{wide}}  {step.action:<{len(MAYBE)}}  {_took(step):>8}"
        f"  {memory_of(step):>9}  {'; '.join(step.why)}".rstrip()
        for step in steps
    ]
    lines.append(f"  {summary(steps)}")
    return "\n".join(lines)


def summary(steps: Sequence[PlannedStep]) -> str:
    """Count the steps that run or may run, with the time of their last run, and the refused ones.

    Steps that run only if one above changes are counted: `ft plan` and the UI give one number.
    """
    refused = sum(step.action == REFUSED for step in steps)
    stopped = sum(step.action == STOPPED for step in steps)
    working = [step for step in steps if step.action in (RUNS, MAYBE)]
    known = [step.seconds for step in working if step.seconds is not None]
    parts = list[str]()
    if working:
        time = f", {sum(known) / 60:.1f} min as the last time" if known else ""
        never = len(working) - len(known)
        parts.append(
            f"{len(working)} of {len(steps)} steps{time}"
            + (f" ({never} never ran)" if never else "")
        )
    elif not refused:
        parts.append("nothing to do")
    if refused:
        parts.append(f"{refused} refused; {stopped} below would not be reached")
    return "; ".join(parts)


def _took(step: PlannedStep) -> str:
    return "–" if step.seconds is None else f"{step.seconds:.0f} s"


def memory_of(step: PlannedStep) -> str:
    """Format the GPU memory of a training: predicted (with ≈), else that of its last run."""
    if step.predicted_gb is not None:
        return f"≈ {step.predicted_gb:.1f} GB"
    return "" if step.memory_gb is None else f"{step.memory_gb:.1f} GB"
