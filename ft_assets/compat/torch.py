"""Hooks into private parts of torch."""

from collections.abc import Iterable
from typing import Any


def use_expandable_segments() -> None:
    """Let the GPU allocator grow its segments.

    Otherwise micro-batches of many lengths leave holes.
    """
    import torch

    torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def ignore_in_ddp(model: Any, names: Iterable[str]) -> None:
    """Let DDP neither average nor broadcast the named parameters of a model."""
    model._ddp_params_and_buffers_to_ignore = list(names)


def varlen_attention(
    query: Any,
    key: Any,
    value: Any,
    bounds: Any,
    longest: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Any:
    """Return causal attention of packed documents, (T, H, D), with FlashAttention-2 inside torch.

    query: (T, H, D). key, value: (T, KV heads, D). bounds: (documents + 1,) int32, the first token
    of each document and T. `window`: the positions that a sliding-window layer sees.

    It is the operator behind torch.nn.attention.varlen. Unlike the public function, it takes
    grouped key and value heads in every torch since 2.9.
    """
    import torch

    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        dropout,
        True,  # causal
        False,  # no debug mask
        scale=scaling,
        window_size_left=window - 1 if window else -1,
        window_size_right=0,
    )[0]
