"""The contract of a launcher, and the difference between a failed step and a failed machine."""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from ft_assets.errors import FtError, InfrastructureFault, StepFailed, StepLost
from ft_assets.job import Job, StepResult

# A line of the job's progress file: its time, its message, and numbers.
OnProgress = Callable[[Mapping[str, str | float]], None]
TAIL_LINES = 30

# Signals from outside: the OOM killer, a shutdown, a scheduler that reclaims the node, a failed
# disk or memory. Not SEGV, ABRT and ILL: a program that crashes by itself crashes again.
FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGBUS})
# What libraries print when the hardware or the network failed. Such a process ends with code 1.
HARDWARE = re.compile(
    r"uncorrectable ECC error"
    r"|CUDA error: (?:unspecified launch failure|device unavailable)"
    r"|GPU has fallen off the bus"
    r"|NCCL error.*(?:remote process exited|network|unhandled system error)"
    r"|Connection closed by peer|Connection reset by peer"
    r"|Stale file handle|Transport endpoint is not connected"
)


class Launcher(Protocol):
    """Runs a job to its end."""

    def run(self, job: Job, on_progress: OnProgress) -> StepResult:
        """Run the job and return its result; its files are in `job.output`.

        An interrupt stops all processes of the step.

        Raises the step's own FtError, StepFailed if it ended without a result, or StepLost if the
        infrastructure failed.
        """
        ...


def failed(step: str, code: int, tail: str, how: str = "", crash: str = "") -> StepFailed:
    """Return the error of a step that ended with this exit code.

    A negative code is a signal; a shell reports the same signal as 128 plus its number. `crash` is
    the text of an unexpected error. It is not told of a fault: then it is what another rank made of
    the lost one.
    """
    number = -code if code < 0 else code - 128
    is_fault = (
        code == InfrastructureFault.exit_code
        or number in {int(known) for known in FROM_OUTSIDE}
        or HARDWARE.search(f"{tail}\n{crash}") is not None
    )
    return StepLost(step, code, tail, how) if is_fault else StepFailed(step, code, tail, how, crash)


def prepare(job: Job) -> Path:
    """Make the job's work folder without files of an earlier try, and return its job.json."""
    job.work.mkdir(parents=True, exist_ok=True)
    for left in (job.result_file, job.error_file, job.crash_file, job.progress_file):
        left.unlink(missing_ok=True)
    job_file = job.work / "job.json"
    job_file.write_text(job.model_dump_json(indent=1))
    return job_file


def outcome(job: Job, code: int, how: str = "") -> StepResult:
    """Return the result in the job's work folder. Raises its FtError, StepFailed or StepLost."""
    if code == 0 and job.result_file.exists():
        result = json.loads(job.result_file.read_text())
        return StepResult(result["metrics"], result["parts"])
    if job.error_file.exists():
        raise FtError.from_dict(json.loads(job.error_file.read_text()))
    crash = job.crash_file.read_text() if job.crash_file.exists() else ""
    raise failed(job.step, code, tail(job.log_file), how, crash and f"{crash}\n{_where(job)}")


def _where(job: Job) -> str:
    """Return where the stack trace of an unexpected error is, and what to do with it."""
    return (
        f"  details:  {job.log_file} (the stack trace)\n"
        "  to do:    report it with this file, if the message does not name your own mistake"
    )


def save_error(job: Job, error: FtError) -> None:
    """Write a user's error to the work folder, as a step does. The first error of a job stays."""
    print(error, file=sys.stderr)
    with contextlib.suppress(FileExistsError), job.error_file.open("x") as file:
        json.dump(error.to_dict(), file)


class ProgressReader:
    """Passes on the lines that a step adds to its progress file, once they are complete."""

    def __init__(self, job: Job, on_progress: OnProgress) -> None:
        self._path = job.progress_file
        self._on_progress = on_progress
        self._offset = 0

    def __call__(self) -> None:
        for line in self._new_lines():
            self._on_progress(json.loads(line))

    def _new_lines(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            chunk = file.read()
        complete = chunk[: chunk.rfind(b"\n") + 1]
        self._offset += len(complete)
        yield from complete.splitlines()


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a text file."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no output)"
