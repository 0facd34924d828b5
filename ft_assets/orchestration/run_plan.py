"""Predict what a run would do, and why: walk the graph with a materializer that makes nothing.

It compares fingerprints. A step below one that would run is compared with today's versions: it runs
if the content of the step above changes. Times and memory are those of the step's last run.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import dagster as dg

from ft_assets.artifacts import Artifact, ArtifactStore, open_store
from ft_assets.artifacts.store import Turn
from ft_assets.artifacts.verification import HISTORIES
from ft_assets.compat.dagster import call_body
from ft_assets.config import Project
from ft_assets.errors import ArtifactError, FtError, InfrastructureFault
from ft_assets.job import StepSettings
from ft_assets.orchestration.assuming_store import Assumed, AssumingStore
from ft_assets.orchestration.materializer import Finish, Inputs, Make, Wanted
from ft_assets.orchestration.memory_forecast import Forecast, forecast
from ft_assets.orchestration.place import name_of
from ft_assets.screen import screen_of

RUNS, MAYBE, REUSED, REFUSED, STOPPED = (
    "runs",
    "runs if that changes",
    "reused",
    "refused",
    "not reached",
)
SHOWN_INPUTS = 6  # in the reasons of a step
Build = Callable[[Project], dg.Definitions]
# Without a handler, Python's last resort prints errors.
SILENT = logging.getLogger("ft.plan.silent")
SILENT.addHandler(logging.NullHandler())
SILENT.propagate = False


@dataclass(frozen=True)
class PlannedStep:
    """What would happen to one asset.

    `seconds` and `memory_gb` are those of the last run, None if it never ran. `predicted_gb` is the
    memory plan's, None if its inputs or the GPU are not known yet. `predicted_seconds` is that of a
    training on a GPU that was asked for. `version` is the fingerprint by
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
    predicted_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Planned(Exception):
    """Ends an asset's function when its artifact is recorded."""


@dataclass(frozen=True)
class PlanContext:
    """What an asset's function reads of Dagster's context before it asks for its artifact."""

    asset_key: dg.AssetKey
    assets_def: dg.AssetsDefinition
    partition: str | None
    run_id: str = "plan"
    log: logging.Logger = SILENT

    @property
    def has_partition_key(self) -> bool:
        return self.partition is not None

    @property
    def partition_key(self) -> str:
        assert self.partition is not None, f"{self.asset_key.to_user_string()} has no partitions"
        return self.partition


class Planner:
    """The Materializer that makes nothing and records what a run would make."""

    plans = True

    def __init__(self, project: Project, store: ArtifactStore) -> None:
        self.project = project
        self.store = AssumingStore(store)
        self.steps: dict[str, PlannedStep] = {}
        self.wanted: dict[str, Wanted] = {}
        self.unmade: set[str] = set()  # there is no version that the steps below could read
        self.missing: dict[str, str] = {}  # {asset: the version that it needs and that is not made}

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
        """Record whether the artifact would be made. Raises Planned: the rest only shows it."""
        wanted = Wanted.of(context, identity, inputs or {}, libraries)
        self.record(wanted)
        raise Planned

    def record(self, wanted: Wanted) -> None:
        """Record what would happen to an artifact."""
        self.wanted[wanted.asset] = wanted
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
            self.unmade.add(wanted.asset)

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
        """Record that there is nothing to do, unless an asset in `above` would change.

        Raises Planned.
        """
        moving = sorted(
            name
            for name in above
            if name in self.steps and self.steps[name].action in (RUNS, MAYBE)
        )
        partition = artifact.manifest.partition
        action, reason = (MAYBE, [f"after {', '.join(moving)}"]) if moving else (REUSED, [])
        self.steps[artifact.asset] = PlannedStep(artifact.asset, partition, action, reason)
        raise Planned


def reasons(wanted: Wanted, current: Artifact | None) -> list[str]:
    """List the differences between what is wanted and the current version."""
    if current is None:
        return ["never made"]
    was, found = current.manifest, list[str]()
    if was.code_version != wanted.code_version:
        found.append(f"its code changed (version {was.code_version} → {wanted.code_version})")
    inputs = _changed(was.inputs, wanted.inputs)
    found += [f"{name} changed" for name in inputs[:SHOWN_INPUTS]]
    if len(inputs) > SHOWN_INPUTS:  # of the leaderboard, one for each base model
        found.append(f"{len(inputs) - SHOWN_INPUTS} more inputs changed")
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


class Plans:
    """Plans of a project's base models, which share what is the same for all of them.

    An asset without partitions is asked once for each state of the store that it can see. A step
    may need what the plan of a base model before it makes.
    """

    def __init__(self, project: Project, build: Build) -> None:
        # A server that does not answer is reported at once, not retried.
        once = project.launcher.model_copy(update={"retries": 0})
        self._project = project.model_copy(update={"launcher": once})
        self.store = open_store(self._project)
        self.graph = build(project).resolve_asset_graph()
        self._shared: dict[tuple[str, Assumed], Wanted] = {}
        self._made = set[str]()  # by the plans so far

    def of(self, keys: Sequence[dg.AssetKey], partition: str | None) -> list[PlannedStep]:
        """Plan a step for each asset of `keys`, in the graph's order."""
        with self.store.hashes.held():
            steps = list(self._steps(set(keys), partition).values())
        self._made |= {
            f"{step.asset}[{partition}]" for step in steps if step.action in (RUNS, MAYBE)
        }
        return steps

    def _steps(self, wanted: set[dg.AssetKey], partition: str | None) -> dict[str, PlannedStep]:
        planner = Planner(self._project, self.store)
        refused, steps = dict[str, str](), dict[str, PlannedStep]()
        unreached = set[str]()
        for key in (
            key
            for level in self.graph.toposorted_asset_keys_by_level
            for key in sorted(level)
            if key in wanted
        ):
            name = name_of(key)
            parents = sorted(
                {name_of(parent) for parent in self.graph.get(key).parent_keys} & steps.keys()
            )
            if unreached & set(parents):
                unreached.add(name)
            else:
                reason = self._ask(planner, key, partition)
                refused |= {name: reason} if reason is not None else {}
                unreached |= planner.unmade | refused.keys()
            steps[name] = self._step(planner, key, partition, parents, steps, refused)
        return steps

    def _ask(self, planner: Planner, key: dg.AssetKey, partition: str | None) -> str | None:
        """Have an asset's step recorded. Return why it cannot be, None if it is."""
        node, name = self.graph.get(key), name_of(key)
        state = (name, planner.store.assumed())
        own = partition if node.is_partitioned else None
        context: Any = PlanContext(key, node.assets_def, own)
        try:
            if not node.is_partitioned and state in self._shared:
                planner.record(self._shared[state])
                return None
            call_body(node.assets_def, context, planner)
            return None
        except Planned:
            if not node.is_partitioned and name in planner.wanted:
                self._shared[state] = planner.wanted[name]
            return None
        except dg.Failure as error:
            return error.description or ""
        except ArtifactError as error:
            planner.missing[name] = error.where
            return str(error)
        except (FtError, InfrastructureFault) as error:
            return str(error)
        except Exception as error:  # an asset's own fault: as a run shows it
            return screen_of(error, name)[0]

    def _step(
        self,
        planner: Planner,
        key: dg.AssetKey,
        partition: str | None,
        parents: Sequence[str],
        steps: Mapping[str, PlannedStep],
        refused: Mapping[str, str],
    ) -> PlannedStep:
        """Return the planned step of an asset, after those above it."""
        name = name_of(key)
        above = [parent for parent in parents if steps[parent].action in (RUNS, MAYBE)]
        stopped = [parent for parent in parents if steps[parent].action in (REFUSED, STOPPED)]
        if stopped:
            return PlannedStep(name, partition, STOPPED, [f"after {', '.join(stopped)}"])
        if name in planner.steps:
            wanted = planner.wanted.get(name)
            return replace(planner.steps[name], version=wanted and wanted.fingerprint)
        if (first := planner.missing.get(name)) in self._made:
            return PlannedStep(name, partition, RUNS, [f"after {first}"])
        if above:  # not reached, or refused with the artifacts of today
            own = partition if self.graph.get(key).is_partitioned else None
            there = name in refused or planner.store.current(name, own) is not None
            return PlannedStep(
                name, partition, MAYBE if there else RUNS, [f"after {', '.join(above)}"]
            )
        return PlannedStep(name, partition, REFUSED, [refused.get(name, "")])


def plan(
    project: Project, build: Build, keys: Sequence[dg.AssetKey], partition: str | None
) -> list[PlannedStep]:
    """Plan a step for each asset of `keys`, in the graph's order."""
    return Plans(project, build).of(keys, partition)


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
    if step.predicted_seconds is not None:
        return f"≈ {step.predicted_seconds:.0f} s"
    return "–" if step.seconds is None else f"{step.seconds:.0f} s"


def memory_of(step: PlannedStep) -> str:
    """Format the GPU memory of a training: predicted (with ≈), else that of its last run."""
    if step.predicted_gb is not None:
        return f"≈ {step.predicted_gb:.1f} GB"
    return "" if step.memory_gb is None else f"{step.memory_gb:.1f} GB"
