"""The one way to make an artifact.

An artifact whose fingerprint is in the store already is reused. Dagster itself skips no selected
step.
"""

import contextlib
import dataclasses
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import dagster as dg

from ft_assets.artifacts import (
    Artifact,
    ArtifactStore,
    fingerprint,
    open_store,
)
from ft_assets.artifacts.environment import library_versions
from ft_assets.artifacts.lease import Lease
from ft_assets.artifacts.manifest import FileEntry, Read, file_entries
from ft_assets.artifacts.store import Turn
from ft_assets.artifacts.verification import HISTORIES
from ft_assets.config import Project
from ft_assets.config.launcher import LauncherSettings
from ft_assets.errors import ArtifactError, FtError, InfrastructureFault, StepFailed, VerdictError
from ft_assets.job import Job, StepResult, StepSettings
from ft_assets.launchers import LocalLauncher, make_launcher
from ft_assets.orchestration.instance import require_kept
from ft_assets.orchestration.place import key_of
from ft_assets.orchestration.readable import readable
from ft_assets.release.records import require_recorded
from ft_assets.screen import screen_of

# {name: (artifact, the part of it that is read; None for all of it)}
Inputs = Mapping[str, tuple[Artifact, str | None]]
Make = Callable[[Path], StepResult]
# Adds files about the finished ones, e.g. signatures, and returns metrics about them.
Finish = Callable[[Path, Mapping[str, FileEntry]], Mapping[str, str]]

SHOW_EVERY_SECONDS = 5.0  # a log line
# An observation, which the UI plots and lists among the events of the asset.
OBSERVE_EVERY_SECONDS = 30.0
OBSERVATIONS = 20  # of one training, at most, beside those of the validation loss
PARTITION_TAG = "dagster/partition"
GPU_POOL = "gpu"
DAGSTERS_OWN = (dg.Failure, dg.RetryRequested, dg.DagsterError)
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


@dataclass(frozen=True)
class Wanted:
    """All that decides the content of an artifact. `settings` is the identity of `materialize`."""

    asset: str
    partition: str | None
    code_version: str
    settings: Any
    inputs: dict[str, str]
    environment: dict[str, str]

    @classmethod
    def of(
        cls, context: dg.AssetExecutionContext, settings: Any, inputs: Inputs, libraries: str | None
    ) -> "Wanted":
        return cls(
            asset=context.asset_key.path[-1],
            partition=context.partition_key
            if context.has_partition_key and context.assets_def.partitions_def
            else None,
            code_version=context.assets_def.code_versions_by_key[context.asset_key] or "1",
            settings=settings,
            inputs={name: artifact.part_version(part) for name, (artifact, part) in inputs.items()},
            environment=library_versions(libraries),
        )

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            self.asset, self.code_version, self.settings, self.inputs, self.environment
        )


class Reader(Protocol):
    """A project with its store, for what only reads."""

    @property
    def project(self) -> Project: ...

    @property
    def store(self) -> ArtifactStore: ...


class Materializer(Reader, Protocol):
    """What an asset works with. `StoreMaterializer` makes artifacts, a plan's notes them.

    `plans`: True if nothing is made, so that an asset must not load what only a run can.
    """

    @property
    def plans(self) -> bool: ...

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
        """Return (artifact, reused). A step (a child process) or `make` (this process) makes it.

        `identity` is the JSON that decides the content: it is fingerprinted, and is the manifest's
        `settings`. `step` is what the step gets, or a function that returns it, called only if the
        artifact is made. Neither overwrites the other. `inputs` are fingerprinted and passed.
        `finish` runs in this process after either of them, before the artifact is published.
        `space` is the free disk space in bytes that the artifact needs. `unread`: the inputs whose
        damage does not stop this: their files are not read, or their damage is shown. `turn`: see
        ArtifactStore.publish.
        """
        ...

    def keep(
        self, context: dg.AssetExecutionContext, artifact: Artifact, above: Sequence[str], why: str
    ) -> tuple[Artifact, bool]:
        """Return the current artifact: the asset has nothing to make.

        `above` are the assets whose change could change that.
        """
        ...


class StoreMaterializer:
    """The Materializer that makes artifacts and publishes them in the store.

    It is a Dagster resource: it has no connection, only paths and settings.
    """

    plans = False

    def __init__(self, project: Project) -> None:
        self.project = project
        self.store = open_store(project)
        self.launcher = make_launcher(project.launcher, project.root)

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
        """See Materializer. An artifact that the store has whole is not made again."""
        require_kept(context.instance, self.project)
        inputs = inputs or {}
        wanted = Wanted.of(context, identity, inputs, libraries)
        if wanted.partition and PARTITION_TAG not in context.run.tags:
            tag_run(context, base_model=wanted.partition)  # a run of a range of partitions
        asset, partition, version = wanted.asset, wanted.partition, wanted.fingerprint
        read = [one for name, (one, _) in inputs.items() if name not in unread]
        known, damage = self._known(wanted)
        if known is not None:
            require_recorded(known, read)
            self.store.make_current(known, partition, turn)
            context.log.info(
                f"reused {asset} {version[:8]}: nothing that it depends on has changed"
            )
            return known, True
        if damage is not None:
            context.log.warning(f"{asset} {version[:8]} is damaged and is made again: {damage}")
        self._verify(read)
        if isinstance(self.launcher, LocalLauncher):
            self.launcher.warm_up()  # while light assets are made
        self.store.require_space(space or 50_000_000, asset)
        publish = partial(self._publish, wanted, inputs, finish, damage is not None)
        if step is None:
            assert make is not None, "either a step or a function makes an artifact"
            with self.store.staging(asset, partition) as staged:
                started = time.time()
                return publish(staged, make(staged), started, turn), False
        lease = Lease(self.store, asset, partition, version, context.run_id, context.log.info)
        with lease:
            # Another run may have made it while this one waited.
            known, _ = self._known(wanted)
            if known is not None:
                self.store.make_current(known, partition, turn)
                return known, True
            step = step if isinstance(step, StepSettings) else step()
            live = Live(context, partition)

            def progress(message: Mapping[str, Any]) -> None:
                lease.require()  # ends a step that another run has taken over
                live(message)

            with self.store.staging(asset, partition) as staged:
                started = time.time()
                job = self._job(wanted, step, inputs, staged, lease.folder)
                made = self.launcher.run(job, progress)
                published = publish(staged, made, started, _fenced(turn or Turn(), lease))
            shutil.rmtree(lease.folder, ignore_errors=True)
        return published, False

    def _job(
        self, wanted: Wanted, step: StepSettings, inputs: Inputs, staged: Path, checkpoints: Path
    ) -> Job:
        return Job(
            step=step.STEP.name,
            gpu=step.STEP.gpu,
            distributed=step.STEP.distributed,
            asset=wanted.asset,
            partition=wanted.partition,
            fingerprint=wanted.fingerprint,
            settings=step.to_json_dict(),
            inputs={
                name.partition("#")[0]: artifact.path for name, (artifact, _) in inputs.items()
            },
            output=staged,
            checkpoints=checkpoints,
            work=self.store.root / ".work" / "jobs" / f"{wanted.asset}-{uuid.uuid4().hex[:8]}",
        )

    def _publish(
        self,
        wanted: Wanted,
        inputs: Inputs,
        finish: Finish | None,
        replaces: bool,
        staged: Path,
        made: StepResult,
        started: float,
        turn: Turn | None,
    ) -> Artifact:
        """Publish a version; replaces: in the place of a damaged one."""
        known_files, more = dict[str, FileEntry](), dict[str, str]()
        if finish is not None:
            known_files = file_entries(staged)
            more = dict(finish(staged, known_files))
        if replaces:
            discard = partial(self.store.discard, wanted.asset, wanted.partition)
            turn = _then(turn or Turn(), discard)
        return self.store.publish(
            staged,
            asset=wanted.asset,
            partition=wanted.partition,
            version=wanted.fingerprint,
            code_version=wanted.code_version,
            settings=wanted.settings,
            inputs=wanted.inputs,
            environment=wanted.environment,
            metrics={**made.metrics, **more},
            parts=made.parts,
            started=started,
            inputs_read={
                name: Read(fingerprint=one.fingerprint, files=one.manifest.files_version)
                for name, (one, _) in inputs.items()
            },
            known=known_files,
            turn=turn,
        )

    def _verify(self, inputs: Sequence[Artifact]) -> None:
        """Raise ArtifactError unless each input is as it was published, and as others read it."""
        for artifact in {one.folder: one for one in inputs}.values():
            self.store.verified(artifact)
        for later in inputs:
            require_recorded(later, inputs)

    def _known(self, wanted: Wanted) -> tuple[Artifact | None, ArtifactError | None]:
        """Return the version if the store has it whole, or what is wrong with it.

        Raises the ArtifactError of a damaged history, which cannot be made again.
        """
        try:
            known = self.store.find(wanted.asset, wanted.partition, wanted.fingerprint)
            return (self.store.verified(known) if known else None), None
        except ArtifactError as error:
            if wanted.asset in HISTORIES:
                raise
            return None, error

    def keep(
        self, context: dg.AssetExecutionContext, artifact: Artifact, above: Sequence[str], why: str
    ) -> tuple[Artifact, bool]:
        """See Materializer."""
        self.store.verified(artifact)
        context.log.info(f"kept {artifact.asset} {artifact.fingerprint[:8]}: {why}")
        return artifact, True


def tag_run(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, **tags: str) -> None:
    """Tag the run that executes, `ft/<name>`: the UI's list of runs is filtered by it."""
    context.instance.add_run_tags(
        context.run.run_id, {f"ft/{name}": value for name, value in tags.items()}
    )


def _fenced(turn: Turn, lease: Lease) -> Turn:
    """Return the turn, refused if another run has taken the lease over."""
    return dataclasses.replace(turn, before=lambda version: (lease.require(), turn.before(version)))


def _then(turn: Turn, after_that: Callable[[str], object]) -> Turn:
    """Return the turn with one more thing to do before the change, if it may be made."""
    return dataclasses.replace(
        turn, before=lambda version: (turn.before(version), after_that(version))
    )


class Live:
    """Show a step's progress while it runs: log lines, and observations that the UI plots."""

    def __init__(self, context: dg.AssetExecutionContext, partition: str | None) -> None:
        self.context, self.partition = context, partition
        self.shown = self.observed = 0.0  # the times of the last ones
        self.step = 0  # of the last observation

    def __call__(self, message: Mapping[str, Any]) -> None:
        kind, time_now = message["message"], message["time"]
        numbers = {key: value for key, value in message.items() if key not in ("time", "message")}
        training = kind == "train"
        end = training and numbers["step"] in (1, numbers["steps"])
        if not training or end or time_now - self.shown >= SHOW_EVERY_SECONDS:
            self.shown = time_now if training else self.shown
            self.context.log.info(_line(kind, numbers))
        if kind == "validation" or end or (training and self._is_due(time_now, numbers)):
            if training:
                self.observed, self.step = time_now, numbers["step"]
            metadata = {f"live/{key}": readable(float(value)) for key, value in numbers.items()}
            self.context.log_event(
                dg.AssetObservation(
                    self.context.asset_key, partition=self.partition, metadata=metadata
                )
            )

    def _is_due(self, time_now: float, numbers: Mapping[str, Any]) -> bool:
        """Return True if enough time and enough of the training passed since the last one."""
        steps = numbers["step"] - self.step
        return (
            time_now - self.observed >= OBSERVE_EVERY_SECONDS
            and steps * OBSERVATIONS >= numbers["steps"]
        )


def _line(message: str, numbers: Mapping[str, Any]) -> str:
    if message == "train":
        minutes, seconds = divmod(int(numbers["seconds_left"]), 60)
        shown = "reward" if "reward" in numbers else "loss"
        return (
            f"step {numbers['step']}/{numbers['steps']}  {shown} {numbers[shown]:.4f}"
            f"  {numbers['tokens_per_s']:.0f} tokens/s  {numbers['memory_gb']:.1f} GB"
            f"  {minutes}:{seconds:02d} left"
        )
    return message + "".join(f"  {key} {value}" for key, value in numbers.items())


def result(
    artifact: Artifact, reused: bool, first: Sequence[str] = (), **metadata: Any
) -> dg.MaterializeResult:
    """Build the event that Dagster stores, with its metadata in the order of the asset's page.

    The metrics that `first` names, what is shown of the artifact, and its duration come before the
    other metrics. Numbers are rounded: the manifest has the exact ones.
    """
    numbers = {
        key: readable(value)
        for key, value in artifact.metrics.items()
        if value is not None and isinstance(value, str | int | float | bool)
    }
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.data_version),
        metadata={
            **{key: numbers.pop(key) for key in first if key in numbers},
            **metadata,
            "made_in_seconds": round(artifact.manifest.seconds, 1),
            "reused": reused,
            **numbers,
            "fingerprint": artifact.fingerprint,
            "path": dg.MetadataValue.path(str(artifact.path)),
        },
    )


class user_errors(contextlib.ContextDecorator):
    """Turn any error into a Dagster failure of one screen of text, without a retry.

    A context manager and a decorator. The stack trace of an unexpected error is in a file. Only a
    fault of the infrastructure is retried, up to `launcher.retries` times. Each wait is twice the
    one before.
    """

    def __init__(self, project: Project) -> None:
        self.project = project

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FtError):
            about = {"look_at": dg.MetadataValue.asset(key_of(self.project, "eval_report"))}
            raise dg.Failure(
                description=str(error),
                metadata={key: value for key, value in error.to_dict().items() if value}
                | (about if isinstance(error, VerdictError) else {}),
                allow_retries=False,
            ) from None
        if isinstance(error, InfrastructureFault):
            _again(self.project.launcher, error)
        if isinstance(error, StepFailed):
            raise dg.Failure(
                description=str(error),
                metadata={
                    "output": dg.MetadataValue.md(f"```\n{error.tail}\n```"),
                    "exit_code": error.code,
                },
                allow_retries=False,
            ) from None
        if isinstance(error, InfrastructureFault):
            raise dg.Failure(description=str(error), allow_retries=False) from None
        if isinstance(error, Exception) and not isinstance(error, DAGSTERS_OWN):
            # No chain: Dagster's history would keep each stack trace, and what it quotes.
            name = dg.OpExecutionContext.get().op.name
            raise dg.Failure(description=screen_of(error, name)[0], allow_retries=False) from None


def _again(settings: LauncherSettings, error: InfrastructureFault) -> None:
    """Raise dg.RetryRequested for the asset or check that runs here, if a retry is left."""
    context = dg.OpExecutionContext.get()
    tried = context.retry_number
    if tried < settings.retries:
        wait = settings.retry_seconds * 2**tried
        context.log.warning(
            f"not the step's fault; try {tried + 2} of {settings.retries + 1} follows in "
            f"{wait:.0f} s: {error}"
        )
        raise dg.RetryRequested(max_retries=settings.retries, seconds_to_wait=wait) from error
