"""Training on all GPUs of this machine: one process for each GPU, joined by DDP or FSDP.

The environment of each process is that of `accelerate launch`, plus FT_SHARDING. The processes are
our own (local.py). Steps that do not train run in one process.
"""

import os
import sys
from pathlib import Path

from ft_assets.config.launcher import AccelerateSettings
from ft_assets.hardware import visible_gpus
from ft_assets.job import Job
from ft_assets.launchers.local import LocalLauncher, free_port


class AccelerateLauncher(LocalLauncher):
    """Runs a training step as several ranks, by default one for each GPU."""

    def __init__(self, settings: AccelerateSettings, root: Path = Path()) -> None:
        self.settings = settings

    def ranks(self, job: Job) -> list[dict[str, str]]:
        if not job.distributed:
            return [{}]
        count = self.settings.ranks()
        if count == 1:
            return [{}]
        common = {
            "FT_SHARDING": self.settings.sharding,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **on_one_machine(count),
        }
        return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def on_one_machine(count: int) -> dict[str, str]:
    """Return the environment of ranks that share a machine without GPUs.

    They use the loopback interface, and each of them its share of the cores.
    """
    if visible_gpus():
        return {}
    # gloo looks up the address of the host's name, which need not resolve.
    loopback = "lo" if sys.platform == "linux" else "lo0"
    cores = max(1, (os.cpu_count() or 1) // count)
    return {
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
    }
