"""The contract of a launcher, and how it tells a step's own failure from a fault of what the step ran on."""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ft_assets.errors import FtError, InfrastructureFault
from ft_assets.job import Job, StepResult

OnProgress = Callable[[Mapping[str, Any]], None]
TAIL_LINES = 30
TRAINING_STEPS = frozenset({"sft", "dpo"})  # these can run as several ranks
HEAVY_STEPS = TRAINING_STEPS | {
    "evaluate",
    "merge",
    "release",
    "export",
}  # these want a GPU: a cluster's launcher sends them to it
TEMPORARY = 75  # sysexits.h: a helper process of ours says with it that the cluster failed

# Sent from outside: the OOM killer, a shutdown, a scheduler that takes the node back, a disk or memory that went away. SEGV, ABRT
# and ILL are not among them: a program that crashes by itself does it again.
FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGBUS})
# What the libraries say when the hardware or the network below them failed; whoever says it ends with exit code 1.
HARDWARE = re.compile(
    r"uncorrectable ECC error|CUDA error: (?:unspecified launch failure|device unavailable)|GPU has fallen off the bus"
    r"|NCCL error.*(?:remote process exited|network|unhandled system error)|Connection closed by peer|Connection reset by peer"
    r"|Stale file handle|Transport endpoint is not connected"
)


class Launcher(Protocol):
    """Runs a job to its end, wherever that is."""

    def run(self, job: Job, on_progress: OnProgress) -> StepResult:
        """Return the step's result; the files are in `job.output`.

        Raises the step's own FtError, StepFailed if it ended without a result, or StepLost if that was not its
        doing. When interrupted, nothing of the step goes on.
        """
        ...


class StepFailed(Exception):
    """A step ended without a result. Holds the last lines of its output."""

    def __init__(self, step: str, code: int, tail: str, how: str = "") -> None:
        self.step, self.code, self.tail = step, code, tail
        how = how or (
            f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        )
        super().__init__(f"step {step} {how}; the last lines of its output:\n{tail}")


class StepLost(StepFailed, InfrastructureFault):
    """The machine, the cluster or the network failed, not the step: the same job may succeed when it is tried again."""


def failed(step: str, code: int, tail: str, how: str = "") -> StepFailed:
    """Return the error of a step that ended with this code: a negative one is a signal, above 128 a shell's word for one."""
    number = -code if code < 0 else code - 128
    outside = (
        code == TEMPORARY
        or number in {int(known) for known in FROM_OUTSIDE}
        or HARDWARE.search(tail) is not None
    )
    return (StepLost if outside else StepFailed)(step, code, tail, how)


def prepare(job: Job) -> Path:
    """Make the job's work folder, clear what an earlier try left in it, write job.json. Returns its path."""
    job.work.mkdir(parents=True, exist_ok=True)
    for left in (job.result_file, job.error_file, job.progress_file):
        left.unlink(missing_ok=True)
    job_file = job.work / "job.json"
    job_file.write_text(job.model_dump_json(indent=1))
    return job_file


def outcome(job: Job, code: int, how: str = "") -> StepResult:
    """Return what the step left in its work folder. Raises its FtError, StepFailed or StepLost."""
    if code == 0 and job.result_file.exists():
        result = json.loads(job.result_file.read_text())
        return StepResult(result["metrics"], result["parts"])
    if job.error_file.exists():
        raise FtError.from_dict(json.loads(job.error_file.read_text()))
    raise failed(job.step, code, tail(job.log_file), how)


def save_error(job: Job, error: FtError) -> None:
    """Leave a user's error in the work folder, as a step does; of several only the first stays."""
    print(error, file=sys.stderr)
    with contextlib.suppress(FileExistsError), job.error_file.open("x") as file:
        json.dump(error.to_dict(), file)


class ProgressReader:
    """Passes on the lines that the step has added to its progress file; half a line waits for its end."""

    def __init__(self, job: Job, on_progress: OnProgress) -> None:
        self._path, self._on_progress, self._seen = job.progress_file, on_progress, 0

    def __call__(self) -> None:
        for line in self._lines():
            self._on_progress(json.loads(line))

    def _lines(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._seen)
            chunk = file.read()
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._seen += len(whole)
        yield from whole.splitlines()


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a text file."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no output)"
