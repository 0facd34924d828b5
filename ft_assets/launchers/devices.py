"""One GPU of this machine for a step that needs one.

A process that sees two GPUs trains on both with nn.DataParallel, because transformers enables it.
Two concurrent steps (pool gpu with a limit of 2) would both use the first GPU. So a step of one
process sees a single GPU: the first that no other step of this user holds.
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
    """Hold a GPU; yield the environment of its process and the descriptors that it must inherit.

    The lock belongs to the descriptor: a process that inherits it holds the GPU until it ends, even
    if its launcher is killed. If all GPUs are held (the pool admits more steps than there are
    GPUs), the step shares the first.
    """
    gpus = visible_gpus()
    if len(gpus) < 2:
        yield {}, []
        return
    folder = Path(tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        for gpu in gpus:
            lock = folder / f"ft-gpu-{os.getuid()}-{gpu}.lock"
            file = stack.enter_context(lock.open("wb"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield _only(gpu), [file.fileno()]
                return
        yield _only(gpus[0]), []


def _only(gpu: str) -> dict[str, str]:
    # PCI_BUS_ID: the numbers of nvidia-smi and of the device files. CUDA's own order is by speed.
    return {
        "CUDA_VISIBLE_DEVICES": gpu,
        "CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
    }
