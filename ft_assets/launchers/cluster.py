"""Heavy steps on a cluster with a queue: this process submits, follows and cancels their jobs.

The launcher is part of the run's own process. Progress, results and errors are files of the job's
work folder, which the nodes share. Nothing outlives the run: the launcher cancels what it
submitted, and a job whose run was killed ends itself (node.py).
"""

import contextlib
import hashlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ft_assets.config.launcher import ClusterSettings
from ft_assets.errors import (
    ClusterUnreachable,
    ConfigError,
    FtError,
    InfrastructureFault,
    StepLost,
)
from ft_assets.job import Job, StepResult
from ft_assets.launchers.base import (
    OnProgress,
    ProgressReader,
    outcome,
    prepare,
    tail,
)
from ft_assets.launchers.heartbeat import Heartbeat
from ft_assets.launchers.local import GRACE_SECONDS, LocalLauncher

STORE_NOT_MOUNTED = 66  # EX_NOINPUT of sysexits.h: the node does not see the job's folder
TICK_SECONDS = 1.0  # interval between two reads of the progress file; the cluster is polled less


class Phase(Enum):
    """The life of a job on a cluster. The value is the word in the progress messages."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class JobState:
    """A job as its cluster reports it.

    `detail` is why it waits, where it runs, or how it ended. `exit_code` is that of a process:
    negative for a signal, and that of `InfrastructureFault` for a fault of the cluster.
    """

    phase: Phase
    detail: str = ""
    exit_code: int = 0

    @classmethod
    def lost(cls, detail: str) -> "JobState":
        """Return the state of a job that the cluster ended."""
        return cls(Phase.ENDED, detail, InfrastructureFault.exit_code)


class ClusterLauncher(ABC):
    """Runs heavy steps as jobs of a cluster, and light steps on this machine.

    A subclass implements four verbs: submit, poll, cancel_and_clean_up and ping. Each of them
    raises ClusterUnreachable if the cluster does not answer.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.cluster_settings = settings

    @abstractmethod
    def submit(self, job: Job, job_file: Path) -> str:
        """Submit the job and return the cluster's name of it. Raises ConfigError if refused."""

    @abstractmethod
    def poll(self, name: str) -> JobState:
        """Return the state of the job. Raises ConfigError for a job that can never run."""

    @abstractmethod
    def cancel_and_clean_up(self, name: str, job: Job) -> None:
        """Cancel the job unless it has ended, keep the end of its output, and delete it.

        Returns when none of its processes runs.
        """

    @abstractmethod
    def ping(self) -> str:
        """Return a short description of the cluster. Raises ConfigError if it lacks a setting."""

    def heartbeat(self, job: Job) -> Heartbeat:
        """Return the signs of life that this run sends while the job is on the cluster."""
        return Heartbeat(job, self.cluster_settings.silence_seconds)

    def run(self, job: Job, on_progress: OnProgress) -> StepResult:
        """Run the job to its end. An interrupt cancels it.

        Raises the step's own FtError, ConfigError, StepFailed or StepLost.
        """
        if not job.gpu:
            return LocalLauncher().run(job, on_progress)
        job_file = prepare(job)
        first_failure(job).unlink(missing_ok=True)
        with self.heartbeat(job) as heartbeat:
            try:
                name = self.submit(job, job_file)
            except ClusterUnreachable as error:
                raise _lost(job, "could not be submitted", error) from None
            try:
                end = self._follow(name, job, on_progress)
            except BaseException:
                self._stop(name, job, heartbeat)
                raise
            with contextlib.suppress(ClusterUnreachable):
                self.cancel_and_clean_up(name, job)
        return self._outcome(job, end)

    def _follow(self, name: str, job: Job, on_progress: OnProgress) -> JobState:
        """Pass on progress and changes of state until the job ends, and return its last state.

        Raises StepLost if the cluster does not answer for `patience_seconds`.
        """
        progress = ProgressReader(job, on_progress)
        last = JobState(Phase.QUEUED)
        polled = 0.0
        answered = time.monotonic()
        _report(on_progress, f"submitted as {name}")
        while True:
            progress()
            # A job that has left a result or an error is about to end.
            is_ending = job.result_file.exists() or job.error_file.exists()
            if is_ending or time.monotonic() - polled >= self.cluster_settings.poll_seconds:
                polled = time.monotonic()
                state = self._try_poll(name, job, answered)
                if state is not None:
                    answered = time.monotonic()
                    if state.phase is Phase.ENDED:
                        progress()
                        return state
                    if state != last:
                        _report(on_progress, f"{state.phase.value}: {state.detail}")
                    last = state
            self._wait()

    def _try_poll(self, name: str, job: Job, answered: float) -> JobState | None:
        """Return the state of the job, or None if the cluster has not answered for a short time."""
        try:
            return self.poll(name)
        except ClusterUnreachable as error:
            if time.monotonic() - answered > self.cluster_settings.patience_seconds:
                raise _lost(job, "was lost: the cluster does not answer", error) from None
            return None

    def _stop(self, name: str, job: Job, heartbeat: Heartbeat) -> None:
        """Let a running step write a checkpoint, then cancel the job.

        If the cluster does not answer, the job ends itself when the heartbeat is missing.
        """
        try:
            heartbeat.stop()
            deadline = time.monotonic() + sum(GRACE_SECONDS)
            with contextlib.suppress(ClusterUnreachable, ConfigError):
                while self.poll(name).phase is Phase.RUNNING and time.monotonic() < deadline:
                    self._wait()
        finally:
            with contextlib.suppress(ClusterUnreachable):
                self.cancel_and_clean_up(name, job)

    def _wait(self) -> None:
        time.sleep(min(TICK_SECONDS, self.cluster_settings.poll_seconds))

    def _outcome(self, job: Job, end: JobState) -> StepResult:
        """Return the result that the job left. Raises its FtError, StepFailed or StepLost."""
        code = end.exit_code
        if code == STORE_NOT_MOUNTED:
            raise ConfigError(
                where=f"store: {job.output.parent}",
                found=f"is missing on the node: {tail(job.log_file, 1)}",
                expected="the store on a file system that every node mounts at the same path",
                fix="set store: (or store_cache:) to a folder of such a file system",
            )
        if code not in (0, InfrastructureFault.exit_code) and first_failure(job).exists():
            code = int(first_failure(job).read_text())
        elif code in (0, FtError.exit_code):
            self._wait_for_files(job)
        return outcome(job, code, end.detail)

    def _wait_for_files(self, job: Job) -> None:
        """Wait for the result: a network file system may show it later than the job's end."""
        deadline = time.monotonic() + self.cluster_settings.settle_seconds
        while time.monotonic() < deadline:
            if job.result_file.exists() or job.error_file.exists():
                return
            time.sleep(0.2)


def first_failure(job: Job) -> Path:
    """Return the path of the file that holds the exit code of the first rank that failed."""
    return job.work / "first-failure"


def unique_name(job: Job) -> str:
    """Return a name that is equal for jobs with the same checkpoints: only one of them may run.

    At most 63 letters, digits and hyphens, as Kubernetes requires.
    """
    asset = job.asset.replace("_", "-").lower()[:40]
    return f"ft-{asset}-{hashlib.sha256(str(job.checkpoints).encode()).hexdigest()[:12]}"


def _lost(job: Job, how: str, error: ClusterUnreachable) -> StepLost:
    return StepLost(job.step, InfrastructureFault.exit_code, str(error), how)


def _report(on_progress: OnProgress, message: str) -> None:
    on_progress({"time": time.time(), "message": message})
