"""Attention for packed rows: every document of a row attends to itself alone, with torch's own kernels and nothing else.

A packed row is one row (batch 1) without a 2-D mask whose documents' boundaries are given as `cu_seq_lens_q`, as TRL's
padding-free collator does. On a GPU it runs torch's variable-length attention (FlashAttention-2 inside torch); elsewhere
one scaled-dot-product call a document. Everything that is not packed goes to transformers' own `sdpa`.

The name must not contain "flash": transformers would treat it as one of its flash attentions.
"""

import itertools
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ft_assets.compat.torch import varlen_attention

NAME = "packed_varlen"
LARGEST_HEAD = 256  # of the kernel in torch


def register() -> str:
    """Register the attention and its mask with transformers; returns the name to set on a model."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def kernel_fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether torch's variable-length kernel runs there: 16-bit numbers on an Ampere GPU or later."""
    if (
        device.type != "cuda"
        or dtype not in (torch.bfloat16, torch.float16)
        or head_dim > LARGEST_HEAD
    ):
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Return None for a row that `attend` separates itself, else the mask of `sdpa`."""
    if _one_row(batch_size, q_length, kv_length, attention_mask):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        **kwargs,
    )


def _one_row(batch: int, queries: int, keys: int, attention_mask: torch.Tensor | None) -> bool:
    return attention_mask is None and batch == 1 and queries == keys > 1


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return (attention of shape (1, tokens, heads, head_dim), None), as transformers' attention functions do.

    query: (1, heads, tokens, head_dim); key and value may have fewer heads. Raises ValueError for what the kernels do
    not compute (soft-capped scores, attention sinks): the caller then trains without packing.
    """
    packed = (
        _one_row(query.shape[0], query.shape[2], key.shape[2], attention_mask)
        and kwargs.get("is_causal", True) is not False
    )
    if not packed or not getattr(module, "is_causal", True):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"packed attention computes no {name}")
    if torch.is_autocast_enabled(
        query.device.type
    ):  # rotary embeddings leave fp32 queries and keys
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bounds, longest = _boundaries(query, kwargs)
    if kernel_fits(query.device, query.dtype, query.shape[-1]):
        out = _kernel(query, key, value, bounds, longest, dropout, scaling, sliding_window)
    else:
        out = _document_by_document(query, key, value, bounds, dropout, scaling, sliding_window)
    return out, None


def _boundaries(query: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Return (int32 of shape (documents + 1,), tokens of the longest document)."""
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None:
        return bounds, int(kwargs["max_length_q"])
    tokens, positions = query.shape[2], kwargs.get("position_ids")
    if positions is None:
        return torch.tensor([0, tokens], dtype=torch.int32, device=query.device), tokens
    starts = (
        (positions.reshape(-1) == 0).nonzero().reshape(-1).to(torch.int32)
    )  # not every caller gives the bounds
    if not len(starts) or starts[0] != 0:
        starts = torch.cat([starts.new_zeros(1), starts])
    bounds = torch.cat([starts, starts.new_tensor([tokens])])
    return bounds, int(bounds.diff().max())


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    out = varlen_attention(q, k, v, bounds, longest, dropout, scaling, window)
    return out.unsqueeze(0)  # (1, T, H, D)


def _document_by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    edges, parts = bounds.tolist(), []
    for begin, end in itertools.pairwise(edges):
        q, k, v = (tensor[:, :, begin:end] for tensor in (query, key, value))
        near = (
            _window(end - begin, window, query.device) if window and end - begin > window else None
        )
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=near,
                dropout_p=dropout,
                is_causal=near is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)


def _window(length: int, window: int, device: torch.device) -> torch.Tensor:
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return (back >= 0) & (back < window)
