"""Triton kernels that write FP8 (e4m3) matrices: fp8.py has the same in plain torch for a CPU."""
# Triton compiles the functions with a decorator; to pyright they are functions.
# pyright: reportIndexIssue=false, reportPossiblyUnboundVariable=false

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

TILE = 128  # of a transposed matrix: rows and columns
NF4_ROWS = 64  # of a tile of an NF4 matrix


def quantize(
    parts: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put one to three matrices side by side and quantize each row, as fp8.quantize does."""
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    rows, device = parts[0].shape[0], parts[0].device
    sizes = [part.shape[1] for part in parts]
    out = torch.empty(rows, sum(sizes), dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=device)
    missing = 3 - len(parts)
    sources = [*parts, *[parts[0]] * missing]
    columns = [*factors, *[factors[0]] * missing] if factors else sources
    sizes += [0] * missing
    blocks = [triton.next_power_of_2(max(size, 1)) for size in sizes]
    warps = 4 if sum(blocks) <= 8192 else 8 if sum(blocks) <= 16384 else 16
    _quantize_rows[(rows,)](
        *sources,
        *columns,
        out,
        scale,
        *(source.stride(0) for source in sources),
        *sizes,
        *blocks,
        scaled=bool(factors),
        num_warps=warps,
    )
    return out, scale


def transpose(matrix: torch.Tensor, into: torch.Tensor) -> None:
    """Write an FP8 matrix (rows, columns) transposed into (columns, rows), a slice of a matrix."""
    rows, columns = matrix.shape
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    bits = torch.uint8
    _transpose[grid](
        matrix.view(bits), into.view(bits), rows, columns, into.stride(0), TILE, num_warps=8
    )


def from_nf4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    code: torch.Tensor,
    inverse: torch.Tensor,
    shape: tuple[int, int],
    into: torch.Tensor,
    transposed: bool,
) -> None:
    """Write an NF4 matrix in FP8 into (rows, columns), or `transposed` into (columns, rows).

    packed: two numbers a byte, the first in the high half (bitsandbytes). scales: of 64 numbers
    along a row. code: NF4's 16 numbers. inverse: 1 / the FP8 scale of each row.
    """
    rows, columns = shape
    grid = (triton.cdiv(rows, NF4_ROWS), triton.cdiv(columns, TILE))
    _from_nf4[grid](
        packed,
        scales,
        code,
        inverse,
        into,
        rows,
        columns,
        into.stride(0),
        NF4_ROWS,
        TILE,
        transposed,
        num_warps=8,
    )


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return silu(gate) · up in FP8 with a scale a row, as fp8_mlp.swiglu does."""
    rows, size = gate.shape
    out = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=gate.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=gate.device)
    block = triton.next_power_of_2(size)
    _swiglu[(rows,)](gate, up, out, scale, size, block, num_warps=16)
    return out, scale


def swiglu_gradients(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, factors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both gradients side by side in FP8, as fp8_mlp.swiglu_gradients does."""
    rows, size = gate.shape
    out = torch.empty(rows, 2 * size, dtype=torch.float8_e4m3fn, device=gate.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=gate.device)
    block = triton.next_power_of_2(size)
    _swiglu_gradients[(rows,)](gradient, gate, up, *factors, out, scale, size, block, num_warps=16)
    return out, scale


@triton.jit
def _scaled_row(
    part, factors, row, stride, size: tl.constexpr, block: tl.constexpr, scaled: tl.constexpr
):
    """Return a row in fp32 with its columns multiplied by `factors`, and its largest |number|."""
    at = tl.arange(0, block)
    inside = at < size
    values = tl.load(part + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    if scaled:
        values *= tl.load(factors + at, mask=inside, other=0.0)
    return values, tl.max(tl.abs(values), 0)


@triton.jit
def _store_row(out, values, inverse, size: tl.constexpr, block: tl.constexpr):
    at = tl.arange(0, block)
    tl.store(out + at, (values * inverse).to(tl.float8e4nv), mask=at < size)


@triton.jit
def _quantize_rows(
    part0,
    part1,
    part2,
    factors0,
    factors1,
    factors2,
    out,
    scale,
    stride0,
    stride1,
    stride2,
    size0: tl.constexpr,
    size1: tl.constexpr,
    size2: tl.constexpr,
    block0: tl.constexpr,
    block1: tl.constexpr,
    block2: tl.constexpr,
    scaled: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values0, largest = _scaled_row(part0, factors0, row, stride0, size0, block0, scaled)
    if size1 > 0:
        values1, other1 = _scaled_row(part1, factors1, row, stride1, size1, block1, scaled)
        largest = tl.maximum(largest, other1)
    if size2 > 0:
        values2, other2 = _scaled_row(part2, factors2, row, stride2, size2, block2, scaled)
        largest = tl.maximum(largest, other2)
    largest = tl.maximum(largest, 1e-20)
    tl.store(scale + row, largest / 448.0)
    inverse = 448.0 / largest
    begin = out + row * (size0 + size1 + size2)
    _store_row(begin, values0, inverse, size0, block0)
    if size1 > 0:
        _store_row(begin + size0, values1, inverse, size1, block1)
    if size2 > 0:
        _store_row(begin + size0 + size1, values2, inverse, size2, block2)


@triton.jit
def _transpose(matrix, into, rows, columns, stride, tile: tl.constexpr):
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(matrix + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside)
    at = column[:, None].to(tl.int64) * stride + row[None, :]
    tl.store(into + at, tl.trans(values), mask=tl.trans(inside))


@triton.jit
def _from_nf4(
    packed,
    scales,
    code,
    inverse,
    into,
    rows,
    columns,
    stride,
    row_tile: tl.constexpr,
    tile: tl.constexpr,
    transposed: tl.constexpr,
):
    row = tl.program_id(0) * row_tile + tl.arange(0, row_tile)
    half = tl.program_id(1) * (tile // 2) + tl.arange(0, tile // 2)  # a byte holds two columns
    inside = (row < rows)[:, None] & (half * 2 < columns)[None, :]
    begin = row[:, None].to(tl.int64)
    two = tl.load(packed + begin * (columns // 2) + half[None, :], mask=inside, other=0)
    block = tl.load(
        scales + begin * (columns // 64) + (half // 32)[None, :], mask=inside, other=0.0
    )
    block *= tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
    high = tl.load(code + (two >> 4).to(tl.int32)) * block
    low = tl.load(code + (two & 15).to(tl.int32)) * block
    values = tl.reshape(tl.join(high, low), (row_tile, tile)).to(tl.float8e4nv)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    stored = (row < rows)[:, None] & (column < columns)[None, :]
    if transposed:
        at = column[:, None].to(tl.int64) * stride + row[None, :]
        tl.store(into + at, tl.trans(values), mask=tl.trans(stored))
    else:
        tl.store(into + begin * stride + column[None, :], values, mask=stored)


@triton.jit
def _row(matrix, row, size: tl.constexpr, block: tl.constexpr):
    at = tl.arange(0, block)
    return tl.load(matrix + row * size + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def _swiglu(gate, up, out, scale, size: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    wide = _row(gate, row, size, block)
    values = wide * tl.sigmoid(wide) * _row(up, row, size, block)
    largest = tl.maximum(tl.max(tl.abs(values), 0), 1e-20)
    tl.store(scale + row, largest / 448.0)
    _store_row(out + row * size, values, 448.0 / largest, size, block)


@triton.jit
def _swiglu_gradients(
    gradient,
    gate,
    up,
    gate_factors,
    up_factors,
    out,
    scale,
    size: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < size
    of = _row(gradient, row, size, block)
    wide = _row(gate, row, size, block)
    share = tl.sigmoid(wide)
    of_gate = of * _row(up, row, size, block) * share * (1 + wide * (1 - share))
    of_gate *= tl.load(gate_factors + at, mask=inside, other=0.0)
    of_up = of * wide * share * tl.load(up_factors + at, mask=inside, other=0.0)
    largest = tl.maximum(tl.max(tl.abs(of_gate), 0), tl.max(tl.abs(of_up), 0))
    largest = tl.maximum(largest, 1e-20)
    tl.store(scale + row, largest / 448.0)
    inverse = 448.0 / largest
    _store_row(out + row * (2 * size), of_gate, inverse, size, block)
    _store_row(out + row * (2 * size) + size, of_up, inverse, size, block)
