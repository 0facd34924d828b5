"""Heavy steps on a cluster with a queue: submitted from here, watched from here, and ended from here.

The launcher lives in the run's own process. Progress, results and errors are files of the job's work folder, which the
nodes share. Nothing outlives the run: it cancels what it submitted, and a job whose run was killed ends itself (node.py).
"""

import contextlib
import hashlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ft_assets.config.launcher import ClusterSettings
from ft_assets.errors import ConfigError
from ft_assets.job import Job, StepResult
from ft_assets.launchers.base import (
    HEAVY_STEPS,
    TEMPORARY,
    OnProgress,
    ProgressReader,
    StepLost,
    outcome,
    prepare,
    tail,
)
from ft_assets.launchers.heartbeat import Heartbeat
from ft_assets.launchers.local import GRACE_SECONDS, LocalLauncher

NO_STORE = 66  # sysexits.h: the node does not see the job's folder
TICK_SECONDS = 1.0  # how often the progress file is read; the cluster is asked less often


@dataclass(frozen=True)
class Seen:
    """What a cluster says of a job. `said`: why it waits, where it runs, or how it ended; `code`: as a process's, TEMPORARY for a fault."""

    phase: Literal["waiting", "running", "ended"]
    said: str = ""
    code: int = 0


class NoAnswer(Exception):
    """The cluster did not answer, or only that it cannot now."""


class ClusterLauncher(ABC):
    """What every cluster has in common. Light steps run here."""

    def __init__(self, settings: ClusterSettings) -> None:
        self.cluster_settings = settings

    @abstractmethod
    def submit(self, job: Job, job_file: Path) -> str:
        """Return the cluster's name of the job. Raises ConfigError if the cluster refuses it, NoAnswer."""

    @abstractmethod
    def look(self, name: str) -> Seen:
        """Return what the cluster says of the job. Raises ConfigError for a job that can never run, NoAnswer."""

    @abstractmethod
    def close(self, name: str, job: Job) -> None:
        """End the job if it has not ended, keep its last words, remove it. Returns when nothing of it runs; raises NoAnswer."""

    @abstractmethod
    def greet(self) -> str:
        """Return a few words about the cluster. Raises ConfigError for what it does not offer, NoAnswer."""

    def run(self, job: Job, on_progress: OnProgress) -> StepResult:
        """Run the job to its end. Raises the step's own FtError, ConfigError, StepFailed or StepLost; stops all on interrupt."""
        if job.step not in HEAVY_STEPS:
            return LocalLauncher().run(job, on_progress)
        job_file = prepare(job)
        first_failure(job).unlink(missing_ok=True)
        with Heartbeat(job, self.cluster_settings.silence_seconds) as heartbeat:
            try:
                name = self.submit(job, job_file)
            except NoAnswer as error:
                raise StepLost(job.step, TEMPORARY, str(error), "could not be submitted") from None
            try:
                end = self._follow(name, job, on_progress)
            except BaseException:
                self._stop(name, job, heartbeat)
                raise
            with contextlib.suppress(NoAnswer):
                self.close(name, job)
        return self._outcome(job, end)

    def _follow(self, name: str, job: Job, on_progress: OnProgress) -> Seen:
        """Pass on progress and what the cluster says until the job ends. Raises StepLost when the cluster is silent for too long."""
        progress, last, asked, answered = (
            ProgressReader(job, on_progress),
            Seen("waiting"),
            0.0,
            time.monotonic(),
        )
        _say(on_progress, f"submitted as {name}")
        while True:
            progress()
            left_something = (
                job.result_file.exists() or job.error_file.exists()
            )  # then it is about to end
            if left_something or time.monotonic() - asked >= self.cluster_settings.poll_seconds:
                asked = time.monotonic()
                try:
                    seen = self.look(name)
                except NoAnswer as error:
                    if time.monotonic() - answered > self.cluster_settings.patience_seconds:
                        raise StepLost(
                            job.step,
                            TEMPORARY,
                            str(error),
                            "was lost sight of: the cluster does not answer",
                        ) from None
                else:
                    answered = time.monotonic()
                    if seen.phase == "ended":
                        progress()
                        return seen
                    if (seen.phase, seen.said) != (last.phase, last.said):
                        _say(
                            on_progress,
                            f"{'queued' if seen.phase == 'waiting' else 'running'}: {seen.said}",
                        )
                    last = seen
            time.sleep(min(TICK_SECONDS, self.cluster_settings.poll_seconds))

    def _stop(self, name: str, job: Job, heartbeat: Heartbeat) -> None:
        """Ask a step that runs for a checkpoint, then end the job. A cluster that does not answer is left to the silence."""
        try:
            heartbeat.stop()
            deadline = time.monotonic() + sum(GRACE_SECONDS)
            with contextlib.suppress(NoAnswer, ConfigError):
                while self.look(name).phase == "running" and time.monotonic() < deadline:
                    time.sleep(min(TICK_SECONDS, self.cluster_settings.poll_seconds))
        finally:
            with contextlib.suppress(NoAnswer):
                self.close(name, job)

    def _outcome(self, job: Job, end: Seen) -> StepResult:
        code = end.code
        if code == NO_STORE:
            raise ConfigError(
                where=f"store: {job.output.parent}",
                found=f"is not there on the node: {tail(job.log_file, 1)}",
                expected="the store on a file system that every node mounts at the same path",
                fix="set store: (or store_cache:) to a folder of such a file system",
            )
        if code and code != TEMPORARY and first_failure(job).exists():
            code = int(first_failure(job).read_text())
        elif code in (
            0,
            2,
        ):  # a network file system may show the file a little later than the cluster the end
            deadline = time.monotonic() + self.cluster_settings.settle_seconds
            while (
                not (job.result_file.exists() or job.error_file.exists())
                and time.monotonic() < deadline
            ):
                time.sleep(0.2)
        return outcome(job, code, end.said)


def first_failure(job: Job) -> Path:
    """Return the file with the code of the rank that failed first."""
    return job.work / "first-failure"


def unique_name(job: Job) -> str:
    """Return a name that jobs share which would write the same checkpoints: the cluster lets only one of them run.

    Letters, digits and hyphens, at most 63, as Kubernetes wants it.
    """
    return f"ft-{job.asset.replace('_', '-').lower()[:40]}-{hashlib.sha256(str(job.checkpoints).encode()).hexdigest()[:12]}"


def _say(on_progress: OnProgress, message: str) -> None:
    on_progress({"time": time.time(), "message": message})
