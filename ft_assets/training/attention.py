"""Attention for packed rows: each document of a row attends only to itself, with torch's kernels.

A packed row is one row (batch 1) without a 2-D mask. The boundaries of its documents are given as
`cu_seq_lens_q`, as TRL's padding-free collator does. On a GPU the row runs torch's variable-length
attention (FlashAttention-2 inside torch); elsewhere one scaled-dot-product call per document.
Everything that is not packed uses transformers' own `sdpa`.

The registered name must not contain "flash": transformers would treat it as one of its flash
attentions.
"""

import itertools
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ft_assets.compat.torch import varlen_attention

NAME = "packed_varlen"
MAX_HEAD_DIM = 256  # of torch's kernel


def register() -> str:
    """Register the attention and its mask. Returns the name to set on a model."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def kernel_fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if torch's variable-length kernel runs: 16 bits, an Ampere GPU or later."""
    if device.type != "cuda" or head_dim > MAX_HEAD_DIM:
        return False
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Return None for a row whose documents `attend` separates, else the mask of `sdpa`."""
    if _is_one_row(batch_size, q_length, kv_length, attention_mask):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        **kwargs,
    )


def _is_one_row(batch: int, queries: int, keys: int, attention_mask: torch.Tensor | None) -> bool:
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
    """Return (attention (1, T, H, D), None), the result of transformers' attention functions.

    query: (1, H, T, D). key, value: (1, KV heads, T, D), also with fewer heads. Raises ValueError
    for what the kernels do not compute (soft-capped scores, attention sinks): the caller then
    trains without packing.
    """
    packed = (
        _is_one_row(query.shape[0], query.shape[2], key.shape[2], attention_mask)
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
            raise ValueError(f"packed attention does not compute {name}")
    # Rotary embeddings leave fp32 queries and keys.
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bounds, longest = _boundaries(query, **kwargs)
    if kernel_fits(query.device, query.dtype, query.shape[-1]):
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
        out = varlen_attention(q, k, v, bounds, longest, dropout, scaling, sliding_window)
        return out.unsqueeze(0), None
    return _document_by_document(query, key, value, bounds, dropout, scaling, sliding_window), None


def _boundaries(
    query: torch.Tensor,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, int]:
    """Return (boundaries (documents + 1,) int32, tokens of the longest document).

    Not every caller gives `cu_seq_lens_q`. Without it a document starts at each position 0.
    """
    if cu_seq_lens_q is not None:
        return cu_seq_lens_q, int(max_length_q)
    tokens = query.shape[2]
    if position_ids is None:
        return torch.tensor([0, tokens], dtype=torch.int32, device=query.device), tokens
    starts = (position_ids.reshape(-1) == 0).nonzero().reshape(-1).to(torch.int32)
    if not len(starts) or starts[0] != 0:
        starts = torch.cat([starts.new_zeros(1), starts])
    bounds = torch.cat([starts, starts.new_tensor([tokens])])
    return bounds, int(bounds.diff().max())


def _document_by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    parts = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (tensor[:, :, begin:end] for tensor in (query, key, value))  # (1, heads, t, D)
        local = None
        if window and end - begin > window:
            local = _window(end - begin, window, query.device)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=local,
                dropout_p=dropout,
                is_causal=local is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)  # (1, T, H, D)


def _window(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Return the causal mask (length, length) of a sliding window, True where a key is visible."""
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return (back >= 0) & (back < window)
