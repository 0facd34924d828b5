"""Rotary embeddings of queries and keys as one kernel, liger's, where that gives the same values.

transformers writes them as ten operations, in a function of each model's module. Models differ in
which numbers of a head are a pair, so the function is measured.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ft_assets.models.decoder import layers_of

FUNCTION = "apply_rotary_pos_emb"
ROWS, HEADS, SIZE = 2, 2, 32  # of random numbers


class FusedRotary:
    """The function that a model on a GPU calls, and liger's in its place if that is the same."""

    def __init__(self, model: Any) -> None:
        attention = getattr(next(iter(layers_of(model)), None), "self_attn", None)
        self.module: Any = sys.modules[type(attention).__module__]
        self.fused = _fused(getattr(self.module, FUNCTION, None), model)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Context in which the model's function is liger's."""
        if self.fused is None:
            yield
            return
        own = getattr(self.module, FUNCTION)
        setattr(self.module, FUNCTION, self.fused)
        try:
            yield
        finally:
            setattr(self.module, FUNCTION, own)


def _fused(own: Any, model: Any) -> Any:
    if own is None or model.device.type != "cuda":
        return None
    try:
        from liger_kernel.transformers.rope import (  # type: ignore[import-not-found]
            liger_rotary_pos_emb,
        )
    except ImportError:
        return None
    chance = torch.Generator(model.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance, device=model.device).to(model.dtype)

    query, key = (random(ROWS, 1, HEADS, SIZE).transpose(1, 2) for _ in range(2))
    angles = random(ROWS, 1, SIZE // 2).float()
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(model.dtype) for f in (torch.cos, torch.sin))
    try:
        theirs = own(query, key, cos, sin)
        ours = liger_rotary_pos_emb(query.clone(), key.clone(), cos, sin)
        rounding = 4 * torch.finfo(model.dtype).eps
        same = all(
            torch.allclose(a, b, rtol=rounding, atol=rounding)
            for a, b in zip(theirs, ours, strict=True)
        )
    except (RuntimeError, TypeError, ValueError):  # other arguments
        return None
    return _of_whole_heads(own, liger_rotary_pos_emb) if same else None


def _of_whole_heads(own: Any, fused: Any) -> Any:
    """Return the fused function, and the model's where it rotates a part of each head.

    The fused one reads as many angles as a head has, beyond those that a part of it has.
    """

    def rotate(q: Any, k: Any, cos: Any, *rest: Any, **named: Any) -> Any:
        chosen = fused if cos.shape[-1] == q.shape[-1] else own
        return chosen(q, k, cos, *rest, **named)

    return rotate
