"""The wrapper of a step on a node of a cluster. It ends the step when the step's run ends.

    python -m ft_assets.launchers.node job.json SILENCE_SECONDS [RANKS]

Under Slurm each task is one rank. Elsewhere (in a pod) this is the only process, and it starts
RANKS processes on the GPUs of its machine. It holds the other end of the step's lifeline, as a
local launcher does.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ft_assets.config.launcher import AccelerateSettings
from ft_assets.errors import FtError, RunGone
from ft_assets.job import Job
from ft_assets.launchers.accelerate import AccelerateLauncher, on_one_machine
from ft_assets.launchers.base import save_error
from ft_assets.launchers.cluster import STORE_NOT_MOUNTED, first_failure
from ft_assets.launchers.heartbeat import Watch
from ft_assets.launchers.local import follow, start, step_environment, stop


def slurm_rank(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a Slurm task's rank. MASTER_PORT comes from the batch script."""
    count = int(given["SLURM_NTASKS"])
    if count == 1:
        return {}
    nodes = int(given["SLURM_NNODES"])
    # With `--gpus-per-task` and the like, each task sees a single GPU, which is its device 0.
    visible = [name for name in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    rank = {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": "0" if len(visible) == 1 else given["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(count // nodes),
        # srun runs on the first node, like rank 0. An address, because the name of a node need not
        # resolve on the others.
        "MASTER_ADDR": "127.0.0.1" if nodes == 1 else given["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": given["MASTER_PORT"],
    }
    return rank | (on_one_machine(count) if nodes == 1 else {})


def run(job_file: Path, job: Job, silence_seconds: float, ranks: int | None) -> int:
    """Run the step here and return its exit code; of several ranks, that of the first failure.

    Raises RunGone after it has stopped the step, if the run was cancelled or sends no heartbeat.
    """
    watch = Watch(job, silence_seconds)
    watch.wait_for_beat()
    if ranks is None:
        environments = [slurm_rank(os.environ)]
    else:
        settings = AccelerateSettings(kind="accelerate", processes=ranks)
        environments = AccelerateLauncher(settings).ranks(job)
    read_end, write_end = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, "-m", f"ft_assets.steps.{job.step}", str(job_file)]
    with contextlib.ExitStack() as stack:
        # Slurm collects the output of its tasks. The output of a pod disappears with the pod.
        log = None if ranks is None else stack.enter_context(job.log_file.open("ab")).fileno()
        try:
            for environment in environments:
                whole = {**step_environment(read_end), **environment}
                processes.append(start(command, whole, read_end, log))
            os.close(read_end)
            return follow(processes, watch)
        finally:
            stop(processes)
            os.close(write_end)


def main() -> None:
    job_file = Path(sys.argv[1])
    silence_seconds = float(sys.argv[2])
    ranks = int(sys.argv[3]) if len(sys.argv) > 3 else None
    node = os.uname().nodename
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = Job.model_validate_json(job_file.read_text())
    except FileNotFoundError:
        print(f"{node}: {job_file} does not exist", file=sys.stderr)
        sys.exit(STORE_NOT_MOUNTED)
    try:
        code = run(job_file, job, silence_seconds, ranks)
    except RunGone as error:
        print(f"{node}: {error}; the step was stopped", file=sys.stderr)
        sys.exit(error.exit_code)
    except FtError as error:
        save_error(job, error)
        code = error.exit_code
    if code:  # the scheduler then ends the other ranks, whose own codes mean nothing
        with contextlib.suppress(FileExistsError), first_failure(job).open("x") as file:
            file.write(str(code))
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
