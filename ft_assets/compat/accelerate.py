"""Replaced parts of Accelerate; pyproject.toml bounds it at its next minor version."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def allow_sharded_weights_in_ddp() -> None:
    """Let Accelerate wrap a model with DTensors in DDP, for the rest of this process.

    On GPUs it refuses a model with any DTensor, also where DDP ignores each of them.
    """
    import accelerate.accelerator

    accelerate.accelerator.model_has_dtensor = lambda _: False


@contextmanager
def without_gathering(accelerator: Any) -> Iterator[None]:
    """Let `gather` and `gather_for_metrics` return this rank's value inside the block.

    For a measurement in which each rank computes every row. At the end of an epoch Accelerate
    would also cut what it gathers.
    """
    accelerator.gather = accelerator.gather_for_metrics = lambda value, *_, **__: value
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
