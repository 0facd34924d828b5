"""Attention of one new token a row over slots, without a copy of the keys for each query head.

A slot that the mask hides is not read: padding, what is not yet written, and what lies outside of a
sliding window take no memory traffic. Everything else runs transformers' own `sdpa`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ft_assets.models.decoder import decoder_of

NAME = "slots"
SIZES = (32, 64, 128, 256)  # of a head


@contextmanager
def slot_attention(model: Any) -> Iterator[None]:
    """Context in which a model on a GPU, whose attention is `sdpa`, decodes with the kernel."""
    config = decoder_of(model).config
    own = config._attn_implementation
    if own == "sdpa" and model.device.type == "cuda":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return (attention (rows, 1, heads, size), None), as transformers' attention functions do.

    query: (rows, heads, 1, size). key, value: (rows, heads of keys, slots, size). attention_mask:
    (rows, 1, 1, slots), True where a slot is seen.
    """
    if attention_mask is not None and _is_for_kernel(query, key, value, attention_mask, kwargs):
        from ft_assets.inference.slot_kernel import attended

        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attended(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _is_for_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, kwargs: Any
) -> bool:
    others = ("softcap", "s_aux", "position_bias")
    return (
        query.shape[2] == 1
        and query.dtype == key.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] in SIZES
        and all(tensor.stride(-1) == 1 for tensor in (query, key, value, mask))
        and mask.dtype == torch.bool
        and mask.shape == (query.shape[0], 1, 1, key.shape[2])
        and all(kwargs.get(name) is None for name in others)
    )
