"""The frame around every step.

It reads the job, validates its settings, watches the lifeline, and reports a result or the user's
error.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ft_assets.errors import FtError
from ft_assets.hardware import peak_memory_gb
from ft_assets.job import Job, ProgressFile, Report, StepResult, StepSettings
from ft_assets.redaction import guard_stream
from ft_assets.screen import summary
from ft_assets.system_errors import explained

StepFunction = Callable[[Job, Report], StepResult]
Settings = TypeVar("Settings", bound=StepSettings)


def takes(
    settings: type[Settings],
) -> Callable[[Callable[[Job, Settings, Report], StepResult]], StepFunction]:
    """Declare the settings of a step. They are validated before the step loads anything heavy."""

    def declare(body: Callable[[Job, Settings, Report], StepResult]) -> StepFunction:
        def step(job: Job, report: Report) -> StepResult:
            return body(job, settings.of(job), report)

        return functools.update_wrapper(step, body)

    return declare


def main(step: StepFunction) -> None:
    """Run a step from the command line: `python -m ft_assets.steps.<step> job.json`."""
    guard_stream(sys.stdout)  # both are the job's log
    guard_stream(sys.stderr)
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m ft_assets.steps.{Path(sys.argv[0]).stem} job.json")
    try:
        job = Job.read(Path(sys.argv[1]))
    except FtError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    watch_lifeline()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A shell script's `dagster dev &` leaves SIGINT ignored in all its children. The launcher's
    # first signal would be lost.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rank = int(os.environ.get("RANK", "0"))
    sys.exit(execute(step, job, ProgressFile(job.progress_file), rank))


def execute(step: StepFunction, job: Job, report: Report, rank: int = 0) -> int:
    """Run a step and write its result, or the user's error, to the work folder.

    Return the exit code. Of several ranks that train together only the first reports and
    publishes. Each other rank writes into a folder of its own that is deleted.
    """
    apart = job.work / f"rank-{rank}"
    if rank:
        apart.mkdir(parents=True, exist_ok=True)
        job, report = job.model_copy(update={"output": apart}), _silent
    try:
        result = step(job, report)
    except Exception as error:
        return _report_error(job, error)
    finally:
        if rank:
            shutil.rmtree(apart, ignore_errors=True)
    if rank == 0:
        metrics = {**result.metrics, "peak_memory_gb": round(peak_memory_gb(), 3)}
        job.result_file.write_text(json.dumps({"metrics": metrics, "parts": dict(result.parts)}))
    return 0


def _report_error(job: Job, error: Exception) -> int:
    """Write an error to the work folder for the launcher, and return the exit code.

    The stack trace of an unexpected one is in the step's log.
    """
    known = error if isinstance(error, FtError) else explained(error)
    if known is None:
        traceback.print_exception(error)
        with contextlib.suppress(FileExistsError), job.crash_file.open("x") as file:
            file.write(summary(error))
        return 1
    print(known, file=sys.stderr)
    # "x": the error of the first rank stays.
    with contextlib.suppress(FileExistsError), job.error_file.open("x") as file:
        json.dump(known.to_dict(), file)
    return FtError.exit_code


def _silent(message: str, **numbers: float) -> None:
    return None


def watch_lifeline() -> None:
    """End this process when the launcher's end of the pipe closes: no orphan keeps the GPU."""
    if (descriptor := os.environ.get("FT_LIFELINE_FD")) is None:
        return

    def watch() -> None:
        os.read(int(descriptor), 1)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(30)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
