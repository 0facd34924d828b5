"""Where a step runs: a child process of this machine, in a process group of its own.

Why not the stock Pipes client: its messages arrive only at the end, and on cancel it leaves the children of
`accelerate launch` training. Not here: Dagster. Progress goes to a callback.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ft_assets.errors import FtError
from ft_assets.job import Job, StepResult

POLL_SECONDS = 0.2
GRACE_SECONDS = (20.0, 5.0)  # after INT (time for a checkpoint), after TERM
OnProgress = Callable[[Mapping[str, Any]], None]


class StepFailed(Exception):
    """A step ended without a result. Holds the last lines of its output."""

    def __init__(self, step: str, code: int, tail: str) -> None:
        self.step, self.code, self.tail = step, code, tail
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"step {step} {how}; the last lines of its output:\n{tail}")


class LocalLauncher:
    """Runs a step as `python -m ft_assets.steps.<step> job.json` and streams its progress."""

    def command(self, job_file: Path, job: Job) -> list[str]:
        return [sys.executable, "-m", f"ft_assets.steps.{job.step}", str(job_file)]

    def run(self, job: Job, on_progress: OnProgress) -> StepResult:
        """Run the job to its end. Raises the step's own FtError, or StepFailed; stops the whole group on interrupt."""
        job.work.mkdir(parents=True, exist_ok=True)
        job_file = job.work / "job.json"
        job_file.write_text(job.model_dump_json(indent=1))
        read_end, write_end = os.pipe()  # the lifeline: the child ends when our end closes, also if we are killed
        environment = {**os.environ, "FT_LIFELINE_FD": str(read_end), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        with job.log_file.open("wb") as log:
            process = subprocess.Popen(
                self.command(job_file, job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(read_end,),
                start_new_session=True,
            )
        os.close(read_end)
        try:
            self._follow(process, job, on_progress)
        finally:
            if process.poll() is None:
                stop_group(process)
            os.close(write_end)
        if process.returncode == 0 and job.result_file.exists():
            result = json.loads(job.result_file.read_text())
            return StepResult(result["metrics"], result["parts"])
        if job.error_file.exists():
            raise FtError.from_dict(json.loads(job.error_file.read_text()))
        raise StepFailed(job.step, process.returncode, tail(job.log_file, 30))

    def _follow(self, process: subprocess.Popen[bytes], job: Job, on_progress: OnProgress) -> None:
        seen = 0
        while True:
            ended = process.poll() is not None
            if job.progress_file.exists():
                with job.progress_file.open("rb") as file:
                    file.seek(seen)
                    chunk = file.read()
                whole = chunk[: chunk.rfind(b"\n") + 1]
                seen += len(whole)
                for line in whole.splitlines():
                    on_progress(json.loads(line))
            if ended:
                return
            time.sleep(POLL_SECONDS)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all its children: INT (checkpoint), TERM, KILL."""
    for signum, grace in zip((signal.SIGINT, signal.SIGTERM), GRACE_SECONDS, strict=True):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a text file."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no output)"
