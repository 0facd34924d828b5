"""The Triton kernel of slot_attention.py."""
# Triton compiles the function with a decorator; to pyright it is a function.
# pyright: reportIndexIssue=false, reportPossiblyUnboundVariable=false

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

BLOCK = 64  # slots that are read at once
STAGES = 2  # blocks on their way: measured on an H200, with 4 warps a program
LEAST = 16  # rows of a matrix product
LOWEST = tl.constexpr(-1e30)


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the attention (rows, 1, heads, size) of one query a row; see slot_attention.attend."""
    rows, heads, _, size = query.shape
    groups = heads // key.shape[1]
    out = torch.empty(rows, 1, heads, size, dtype=query.dtype, device=query.device)
    _attend[(key.shape[1], rows)](
        query,
        key,
        value,
        mask,
        out,
        scale * 1.4426950408889634,  # exp(x) = 2 ** (x log2 e)
        key.shape[2],
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        mask.stride(0),
        groups=groups,
        padded=max(LEAST, triton.next_power_of_2(groups)),
        size=size,
        block=BLOCK,
        stages=STAGES,
        num_warps=4,
    )
    return out


@triton.jit
def _attend(
    query,
    key,
    value,
    mask,
    out,
    scale,
    slots,
    query_row,
    query_head,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    mask_row,
    groups: tl.constexpr,
    padded: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, place = tl.arange(0, padded), tl.arange(0, size)
    real = (group < groups)[:, None]
    at = row * query_row + (head * groups + group)[:, None] * query_head + place[None, :]
    asked = tl.load(query + at, mask=real, other=0.0)
    best = tl.full([padded], LOWEST, tl.float32)
    total = tl.zeros([padded], tl.float32)
    sums = tl.zeros([padded, size], tl.float32)
    keys = key + row * key_row + head * key_head + place[None, :]
    values = value + row * value_row + head * value_head + place[None, :]
    for begin in tl.range(0, slots, block, num_stages=stages):
        slot = begin + tl.arange(0, block)
        seen = tl.load(mask + row * mask_row + slot, mask=slot < slots, other=0) != 0
        k = tl.load(keys + slot[:, None] * key_slot, mask=seen[:, None], other=0.0)
        v = tl.load(values + slot[:, None] * value_slot, mask=seen[:, None], other=0.0)
        score = tl.where(seen[None, :], tl.dot(asked, tl.trans(k)) * scale, LOWEST)
        high = tl.maximum(best, tl.max(score, 1))
        weight = tl.where(seen[None, :], tl.exp2(score - high[:, None]), 0.0)
        shrink = tl.exp2(best - high)
        total = total * shrink + tl.sum(weight, 1)
        sums = sums * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        best = high
    heads = tl.num_programs(0) * groups
    to = (row * heads + head * groups + group)[:, None] * size + place[None, :]
    tl.store(out + to, (sums / total[:, None]).to(out.dtype.element_ty), mask=real)
