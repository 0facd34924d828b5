"""On a node of a cluster: `python -m ft_assets.launchers.node job.json SILENCE_SECONDS [RANKS]` runs the step and ends it with its run.

Under Slurm each task is one rank. Elsewhere (a pod) this is the only process, and starts RANKS on the GPUs of its machine.
The step gets a lifeline as it does at home, whose other end is held here.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ft_assets.config.launcher import AccelerateSettings
from ft_assets.errors import FtError
from ft_assets.job import Job
from ft_assets.launchers.accelerate import AccelerateLauncher, on_one_machine
from ft_assets.launchers.base import TEMPORARY, save_error
from ft_assets.launchers.cluster import NO_STORE, first_failure
from ft_assets.launchers.heartbeat import RunGone, Watch
from ft_assets.launchers.local import follow, start, step_environment, stop


def slurm_rank(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the rank that a Slurm task is; MASTER_PORT comes from the batch script."""
    count = int(given["SLURM_NTASKS"])
    if count == 1:
        return {}
    nodes = int(given["SLURM_NNODES"])
    # `--gpus-per-task` and the like leave each task a GPU of its own, which is then its first.
    alone = len([name for name in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]) == 1
    rank = {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": "0" if alone else given["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(count // nodes),
        # srun runs on the first node, as rank 0 does: an address, because a node's name need not resolve on the others.
        "MASTER_ADDR": "127.0.0.1" if nodes == 1 else given["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": given["MASTER_PORT"],
    }
    return rank | (on_one_machine(count) if nodes == 1 else {})


def run(job_file: Path, job: Job, silence_seconds: float, ranks: int | None) -> int:
    """Run the step here. Returns 0 or the code that says most; raises RunGone when the run ended, after the step was stopped."""
    watch = Watch(job, silence_seconds)
    watch.wait_for_beat()
    if ranks is None:
        environments = [slurm_rank(os.environ)]
    else:
        environments = AccelerateLauncher(
            AccelerateSettings(kind="accelerate", processes=ranks)
        ).ranks(job)
    read_end, write_end = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, "-m", f"ft_assets.steps.{job.step}", str(job_file)]
    with contextlib.ExitStack() as stack:
        # Slurm collects the output of its tasks by itself; a pod's would go with the pod.
        log = None if ranks is None else stack.enter_context(job.log_file.open("ab")).fileno()
        try:
            for environment in environments:
                processes.append(
                    start(command, {**step_environment(read_end), **environment}, read_end, log)
                )
            os.close(read_end)
            return follow(processes, watch)
        finally:
            stop(processes)
            os.close(write_end)


def main() -> None:
    job_file, silence_seconds = Path(sys.argv[1]), float(sys.argv[2])
    ranks = int(sys.argv[3]) if len(sys.argv) > 3 else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = Job.model_validate_json(job_file.read_text())
    except FileNotFoundError:
        print(f"{os.uname().nodename}: there is no {job_file}", file=sys.stderr)
        sys.exit(NO_STORE)
    try:
        code = run(job_file, job, silence_seconds, ranks)
    except RunGone as error:
        print(f"{os.uname().nodename}: {error}; the step was ended", file=sys.stderr)
        sys.exit(TEMPORARY)
    except FtError as error:
        save_error(job, error)
        code = 2
    if code:  # the scheduler ends the other ranks, whose codes say nothing then
        with contextlib.suppress(FileExistsError), first_failure(job).open("x") as file:
            file.write(str(code))
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
