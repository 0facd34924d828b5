"""The GPUs of this machine, and one for a step that takes one.

A process that sees two GPUs trains on both through nn.DataParallel, which transformers turns on by itself; and two steps side
by side (pool gpu with a limit of 2) would both take the first. So a step of one process sees one GPU, the first that no other
step of this user holds.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ft_assets.hardware import visible_gpus


@contextlib.contextmanager
def held_gpu() -> Iterator[tuple[dict[str, str], list[int]]]:
    """Context that holds a GPU: what its process gets in its environment, and the descriptors that it must inherit.

    The lock is the descriptor's: a process that inherits it holds the GPU to its own end, also if its launcher is killed.
    Where all are held (the pool admits more steps than there are GPUs) the step shares the first.
    """
    gpus = visible_gpus()
    if len(gpus) < 2:
        yield {}, []
        return
    with contextlib.ExitStack() as stack:
        for gpu in gpus:
            file = stack.enter_context(
                (Path(tempfile.gettempdir()) / f"ft-gpu-{os.getuid()}-{gpu}.lock").open("wb")
            )
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield _alone(gpu), [file.fileno()]
                return
        yield _alone(gpus[0]), []


def _alone(gpu: str) -> dict[str, str]:
    # The numbers of nvidia-smi and of the device files: CUDA's own order would be by speed.
    return {
        "CUDA_VISIBLE_DEVICES": gpu,
        "CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
    }
