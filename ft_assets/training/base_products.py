"""The products with a group's frozen base weights, in both directions, in the compute dtype."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch


class BaseProducts(Protocol):
    """The products of linears that share an input, without their adapters.

    `plain` is True if a layer's own forward multiplies with the same weights.
    """

    plain: bool

    def outputs(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield x Wᵀ + bias (N, out) of each linear, for `x` (N, in), as new tensors."""
        ...

    def input_gradient(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """Return the sum of g W (N, in) over the linears, for the gradients g (N, out)."""
        ...


class DenseProducts:
    """Products in the dtype of the input. NF4 weights are dequantized for each product."""

    plain = True

    def __init__(self, bases: Sequence[Any]) -> None:
        self.bases = bases

    def outputs(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for base in self.bases:
            bias = base.bias.to(x.dtype) if base.bias is not None else None
            yield torch.nn.functional.linear(x, dense_weight(base, x.dtype), bias)

    def input_gradient(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        into: torch.Tensor | None = None
        for base, rows in zip(self.bases, gradients, strict=True):
            if rows is not None:
                weight = dense_weight(base, rows.dtype)
                into = rows @ weight if into is None else into.addmm_(rows, weight)
                del weight
        return into


def dense_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a base layer's weight (out, in) in `dtype`, dequantized if it is NF4."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.to(dtype)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        layer.weight.data,
        kept_scales(layer),
        state.blocksize,
        state.quant_type,
        state.shape,
        dtype,
    )


def kept_scales(layer: Any) -> torch.Tensor:
    """Return an NF4 layer's scales, one fp32 number for each block of 64 parameters.

    bitsandbytes' own function works out at each call how the scales are stored. At 4,096 tokens the
    GPU waits for that, so they are dequantized once and kept.
    """
    scales = layer.__dict__.get("plain_scales")
    if scales is None:
        scales = layer.__dict__["plain_scales"] = _plain_scales(layer.weight.quant_state)
    return scales


def _plain_scales(state: Any) -> torch.Tensor:
    if not state.nested:
        return state.absmax.float()
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
