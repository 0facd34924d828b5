"""How a job on a cluster knows that its run lives: a file on the shared disk whose content the run keeps changing.

No pipe reaches from a node to the run. The node compares contents and measures the time between two changes with its
own clock: the clocks of two machines need not agree.
"""

import contextlib
import itertools
import threading
import time
from pathlib import Path

from ft_assets.job import Job

STOP = "stop"
BEATS_BEFORE_SILENCE = 20  # so many may be lost before a job gives its run up


def heartbeat_file(job: Job) -> Path:
    """Return where the run of a job leaves its sign of life."""
    return job.work / "heartbeat"


class RunGone(Exception):
    """The run of a job was cancelled or has gone silent."""


class Heartbeat:
    """The run's side, a context: a thread of its own beats, so that a cluster that answers slowly does not look like a dead run."""

    def __init__(self, job: Job, silence_seconds: float) -> None:
        self._file, self._every = heartbeat_file(job), silence_seconds / BEATS_BEFORE_SILENCE
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def stop(self) -> None:
        """Ask the job to stop its step with a checkpoint."""
        self._over.set()
        self._thread.join()
        self._write(STOP)

    def _beat(self) -> None:
        for beat in itertools.count(1):
            self._write(str(beat))
            if self._over.wait(self._every):
                return

    def _write(self, content: str) -> None:
        # In place: over NFS an opened file is asked for anew, a renamed one may be seen late. A disk that fails counts as silence.
        with contextlib.suppress(OSError):
            self._file.write_text(content)


class Watch:
    """The node's side: called again and again, it raises RunGone when the run wants an end or is silent for too long."""

    def __init__(self, job: Job, silence_seconds: float) -> None:
        self._file, self._silence = heartbeat_file(job), silence_seconds
        self._content, self._since, self._beats = self._read(), time.monotonic(), 0

    def __call__(self) -> None:
        content = self._read()
        if content == STOP:
            raise RunGone("the run was cancelled")
        if content is not None and content != self._content:
            self._content, self._since, self._beats = content, time.monotonic(), self._beats + 1
        elif time.monotonic() - self._since > self._silence:
            raise RunGone(f"nothing was heard of the run for {self._silence:.0f} s")

    def wait_for_beat(self) -> None:
        """Return when the run has shown that it lives: a job may wait in a queue for longer than its run does."""
        while not self._beats:
            self()
            time.sleep(min(0.5, self._silence / BEATS_BEFORE_SILENCE / 2))

    def _read(self) -> str | None:
        try:
            return self._file.read_text()
        except OSError:  # also a file that was replaced on another machine at this moment
            return None
