"""Training on all GPUs of this machine: one process a GPU, joined by DDP; what one GPU does not hold is divided by FSDP.

The environment of each process is what `accelerate launch` would set, and FT_SHARDING; the processes are ours (see
local.py). Steps that do not train run in one process.
"""

import os
import sys

from ft_assets.config.launcher import AccelerateSettings
from ft_assets.errors import ConfigError
from ft_assets.hardware import visible_gpus
from ft_assets.job import Job
from ft_assets.launchers.base import TRAINING_STEPS
from ft_assets.launchers.local import LocalLauncher, free_port


class AccelerateLauncher(LocalLauncher):
    """Runs training steps as `processes` ranks, by default one for each GPU."""

    def __init__(self, settings: AccelerateSettings) -> None:
        self.settings = settings

    def ranks(self, job: Job) -> list[dict[str, str]]:
        if job.step not in TRAINING_STEPS:
            return [{}]
        count = ranks_of(self.settings)
        if count == 1:
            return [{}]
        common = {"FT_SHARDING": self.settings.sharding}
        common |= {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        common |= on_one_machine(count)
        return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def ranks_of(settings: AccelerateSettings) -> int:
    """Return how many ranks train. Raises ConfigError for more than there are GPUs, and for one that shall divide the base."""
    gpus = len(visible_gpus())
    count = settings.processes or gpus or 1
    if gpus and count > gpus:
        raise ConfigError(
            where="launcher.processes",
            found=str(count),
            expected=f"at most the {gpus} GPUs of this machine",
            fix="lower it, or leave it out",
        )
    if count == 1 and settings.sharding == "fsdp":
        raise ConfigError(
            where="launcher.sharding: fsdp",
            found="one process",
            expected="at least 2 to divide the base among",
            fix="set processes, or sharding: auto",
        )
    return count


def on_one_machine(count: int) -> dict[str, str]:
    """Return what ranks that share a machine without GPUs need: the loopback interface, and their share of its cores."""
    if visible_gpus():
        return {}
    return {  # gloo asks for the address of the host's name, which need not resolve
        "GLOO_SOCKET_IFNAME": os.environ.get(
            "GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"
        ),
        "OMP_NUM_THREADS": os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))
        ),
    }
