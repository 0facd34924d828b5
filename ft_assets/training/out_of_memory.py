"""torch.OutOfMemoryError: the part of its message to show, and the memory it holds."""

import torch


def release(error: torch.OutOfMemoryError) -> str:
    """Free the activations that an error holds, and return the first sentence of its message.

    The frames of its traceback refer to the activations.
    """
    error.__traceback__ = None
    return str(error).split("\n")[0].partition(". ")[0]
