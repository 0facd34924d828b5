"""The heartbeat of a run: a file on the shared disk whose content the run keeps changing.

A job on a cluster reads it, because no pipe reaches from a node to the run. The node compares
contents and measures the time between two changes with its own clock, so the clocks of the two
machines need not agree.
"""

import contextlib
import itertools
import threading
import time
from pathlib import Path

from ft_assets.errors import RunGone
from ft_assets.job import Job

STOP = "stop"
BEATS_BEFORE_SILENCE = 20  # a job gives its run up after this many missing beats


def heartbeat_file(job: Job) -> Path:
    """Return the path of the heartbeat of the job's run."""
    return job.work / "heartbeat"


class Heartbeat:
    """The run's side, a context manager.

    A thread of its own writes the beats, so a cluster that answers slowly does not look like a dead
    run.
    """

    def __init__(self, job: Job, silence_seconds: float) -> None:
        self._file = heartbeat_file(job)
        self._interval = silence_seconds / BEATS_BEFORE_SILENCE
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def stop(self) -> None:
        """Tell the job to stop its step with a checkpoint."""
        self._over.set()
        self._thread.join()
        self.write(STOP)

    def _beat(self) -> None:
        for beat in itertools.count(1):
            self.write(str(beat))
            if self._over.wait(self._interval):
                return

    def write(self, content: str) -> None:
        """Show the content to the job. A failure counts as a missing beat."""
        # In place: NFS revalidates a file when it is opened, but may show a renamed file late.
        with contextlib.suppress(OSError):
            self._file.write_text(content)


class Watch:
    """The node's side. A call raises RunGone if the run was cancelled or its beats are missing."""

    def __init__(self, job: Job, silence_seconds: float) -> None:
        self._file = heartbeat_file(job)
        self._silence = silence_seconds
        self._content = self._read()
        self._since = time.monotonic()
        self._beats = 0

    def __call__(self) -> None:
        content = self._read()
        if content == STOP:
            raise RunGone("the run was cancelled")
        if content is not None and content != self._content:
            self._content = content
            self._since = time.monotonic()
            self._beats += 1
        elif time.monotonic() - self._since > self._silence:
            raise RunGone(f"no heartbeat from the run for {self._silence:.0f} s")

    def wait_for_beat(self) -> None:
        """Wait for the first beat: a job may be queued for longer than its run lives."""
        while not self._beats:
            self()
            time.sleep(min(0.5, self._silence / BEATS_BEFORE_SILENCE / 2))

    def _read(self) -> str | None:
        try:
            return self._file.read_text()
        except OSError:  # e.g. another machine replaces the file at this moment
            return None
