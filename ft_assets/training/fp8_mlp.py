"""A SwiGLU block without adapters as one operation in FP8.

down(silu(gate x) · up x): the product in the middle, and in the backward pass the gradients of both
factors, leave their kernels in FP8. Layer by layer they are written in 16 bits, read again, and
quantized.
"""

import functools
from typing import Any

import torch

from ft_assets.training.fp8 import Fp8Products, quantize
from ft_assets.training.linears import group_of

NAMES = ("gate_proj", "up_proj", "down_proj")
# The relative difference of outputs that differ by one rounding to 16 bits before one to FP8. With
# another activation it is 0.1 and more.
SAME = 0.05
PROBED = 2.0  # the standard deviation of gate x in the probe, where activations differ


def fuse_mlps(model: Any) -> int:
    """Replace the forward of the SwiGLU blocks whose linears are in FP8. Returns their number.

    Only of blocks whose own forward computes the same, which is tried.
    """
    dtype = model.get_base_model().dtype
    fused = 0
    for module in model.modules():
        products = _products(module)
        if products is not None and _computes_the_same(module, products, dtype):
            module.forward = functools.partial(_forward, *products)
            fused += 1
    return fused


def _products(module: Any) -> tuple[Fp8Products, Fp8Products] | None:
    """Return the products of gate and up, and of down; None if one is not frozen or not in FP8."""
    members = module._modules
    if not all(name in members for name in NAMES):
        return None
    gate, up, down = (group_of(members[name]) for name in NAMES)
    if gate is None or down is None or gate is not up or len(gate.members) != 2:
        return None
    wide, narrow = gate.products, down.products
    if not isinstance(wide, Fp8Products) or not isinstance(narrow, Fp8Products):
        return None
    adapted = gate.bases + down.bases != gate.members + down.members
    biased = any(bias is not None for bias in (*wide.biases, *narrow.biases))
    return None if adapted or biased else (wide, narrow)


def _computes_the_same(
    module: Any, products: tuple[Fp8Products, Fp8Products], dtype: torch.dtype
) -> bool:
    """Compare a block's own forward with the operation, on random input."""
    weight = products[0].weights[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, weight.shape[1], generator=generator).to(weight.scale.device)
    with torch.no_grad():
        gate = next(products[0].outputs(x[0]))
        x = (x * (PROBED / gate.float().std())).to(dtype)
        own, fused = module(x).float(), _forward(*products, x).float()
    return bool((own - fused).norm() <= SAME * own.norm())


def _forward(wide: Fp8Products, down: Fp8Products, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _Mlp.apply(x, wide, down)
    return out


class _Mlp(torch.autograd.Function):
    """x, y: (B, T, hidden); inside N = B · T rows. Keeps gate x and up x, (N, intermediate)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wide: Fp8Products, down: Fp8Products) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        gate, up = wide.outputs(x.reshape(-1, x.shape[-1]).to(dtype))
        ctx.save_for_backward(gate, up)
        ctx.products = wide, down
        ctx.input_dtype = x.dtype
        rows, scale = swiglu(gate, up)
        return down.output(rows, scale, down.weights[0], dtype).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        gate, up = ctx.saved_tensors
        wide, down = ctx.products
        hidden = down.input_gradient([gradient.reshape(-1, gradient.shape[-1]).to(gate.dtype)])
        factors = [weight.scale for weight in wide.weights]
        rows, scale = swiglu_gradients(hidden, gate, up, factors)
        into = wide.gradient_of(rows, scale, wide.weights, gate.dtype)
        return into.reshape(gradient.shape).to(ctx.input_dtype), None, None


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return silu(gate) · up (N, intermediate) in FP8, and the scales of its rows (N, 1)."""
    if gate.is_cuda:
        from ft_assets.training import fp8_kernels

        return fp8_kernels.swiglu(gate, up)
    return quantize([torch.nn.functional.silu(gate.float()) * up.float()])


def swiglu_gradients(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, factors: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up side by side (N, 2 · intermediate) in FP8, and scales.

    gradient: of silu(gate) · up. factors: the columns of both gradients are multiplied with them.
    """
    if gate.is_cuda:
        from ft_assets.training import fp8_kernels

        return fp8_kernels.swiglu_gradients(gradient, gate, up, factors)
    of, wide = gradient.float(), gate.float()
    share = torch.sigmoid(wide)
    of_gate = of * up.float() * share * (1 + wide * (1 - share))
    return quantize([of_gate, of * wide * share], factors)
