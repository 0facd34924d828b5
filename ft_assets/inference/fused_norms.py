"""The RMS norms of a decoder as one kernel each, where that gives the same values.

transformers writes them as eight operations. torch's own multiplies by the weight before it rounds,
not after, so values differ by a rounding of the dtype at most. What a class computes is not known
from its name (Gemma adds 1 to the weight), so each norm is measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

ROWS = 4  # of random numbers


class FusedNorms:
    """The norms of a model that torch's own norm can replace."""

    def __init__(self, model: Any) -> None:
        norms = (module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
        self.norms = [(norm, fused) for norm in norms if (fused := _fused(norm)) is not None]

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Context in which the norms' forward is torch's."""
        for norm, fused in self.norms:
            norm.forward = fused
        try:
            yield
        finally:
            for norm, _ in self.norms:
                del norm.forward


def _fused(norm: Any) -> Any:
    weight = getattr(norm, "weight", None)
    size = getattr(norm, "variance_epsilon", None)
    if weight is None or size is None or weight.ndim != 1 or "forward" in norm.__dict__:
        return None
    fused = partial(
        torch.nn.functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=size
    )
    chance = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(ROWS, len(weight), generator=chance, device=weight.device).to(weight.dtype)
    try:
        theirs, ours = norm(x).float(), fused(x).float()
    except (RuntimeError, TypeError):  # other arguments, or gated
        return None
    rounding = 2 * torch.finfo(weight.dtype).eps
    close = (theirs - ours).abs() <= rounding * theirs.abs() + torch.finfo(weight.dtype).tiny
    return fused if theirs.shape == ours.shape and bool(close.all()) else None
