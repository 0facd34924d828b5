"""The frame around every step: read the job, watch the lifeline, report a result or the user's error."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ft_assets.errors import FtError
from ft_assets.hardware import peak_memory_gb
from ft_assets.job import Job, ProgressFile, Report, StepResult

Step = Callable[[Job, Report], StepResult]


def main(step: Step) -> None:
    """Run a step from the command line: `python -m ft_assets.steps.<step> job.json`."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m ft_assets.steps.{Path(sys.argv[0]).stem} job.json")
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    watch_lifeline()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A shell script's `dagster dev &` leaves SIGINT ignored in all its children: the launcher's first word would be lost.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rank = int(os.environ.get("RANK", "0"))
    sys.exit(execute(step, job, ProgressFile(job.progress_file), rank))


def execute(step: Step, job: Job, report: Report, rank: int = 0) -> int:
    """Run a step and leave its result, or the user's error, in the work folder. Returns the exit code.

    Of several ranks that train together only the first reports and publishes: the others write into a folder of their own
    that nobody reads.
    """
    apart = job.work / f"rank-{rank}"
    if rank:
        apart.mkdir(parents=True, exist_ok=True)
        job, report = job.model_copy(update={"output": apart}), _silent
    try:
        result = step(job, report)
    except FtError as error:
        print(error, file=sys.stderr)
        with (
            contextlib.suppress(FileExistsError),
            job.error_file.open("x") as file,
        ):  # the first rank that says why
            json.dump(error.to_dict(), file)
        return FtError.exit_code
    finally:
        if rank:
            shutil.rmtree(apart, ignore_errors=True)
    if rank == 0:
        metrics = {**result.metrics, "peak_memory_gb": round(peak_memory_gb(), 3)}
        job.result_file.write_text(json.dumps({"metrics": metrics, "parts": dict(result.parts)}))
    return 0


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
