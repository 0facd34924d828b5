"""Products with the frozen base in FP8 (e4m3), in both directions.

The base is not trained, so besides the outputs x Wᵀ also the gradients g W of the inputs can be
computed in FP8. Each row of both matrices has a scale of its own: its largest absolute value
becomes 448, the largest number of e4m3 (Micikevicius et al. 2022, "FP8 formats for deep learning").
A row is a token, or an output of a weight. So a token never changes how another one is rounded, and
packed documents stay apart.

One stored weight q serves both directions, W ≈ diag(s) q. In g W the sum runs over the outputs, so
the scales s cannot be taken out of the product. They go into the gradient before it is quantized:
g W ≈ (g diag(s)) q.

The tensor cores of Hopper sum fast with about 14 bits, and lose up to a quarter of a long sum whose
terms have one sign. So sums are exact unless the probe (fp8_probe.py) finds fast ones as good.

The adapter stays in the compute dtype. A 16-bit base is stored in FP8, an NF4 base stays NF4 and is
converted for each product. On a CPU the same numbers are multiplied in fp32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ft_assets.training.base_products import dense_weight, kept_scales
from ft_assets.training.linears import linear_groups

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest e4m3 number
SMALLEST = 1e-20  # a row of zeros has this as its largest value
MULTIPLE = 16  # _scaled_mm takes matrices whose sizes are multiples of this
BLOCK = 64  # parameters of an NF4 weight that share a scale


def quantize_base(model: Any) -> int:
    """Let all fused linears that fit multiply in FP8. Returns the number of linears.

    A 16-bit weight is replaced by its FP8 numbers. A linear does not fit if one of its sizes is no
    multiple of 16, or if an NF4 block of 64 parameters spans two of its rows.
    """
    changed = 0
    for group in linear_groups(model):
        if all(_fits(base) for base in group.bases):
            group.products = Fp8Products(group.bases)
            changed += len(group.bases)
    return changed


def sum_fast(model: Any, fast: bool) -> None:
    """Let all products in FP8 sum with fewer bits, or exactly."""
    for group in linear_groups(model):
        if isinstance(group.products, Fp8Products):
            group.products.fast = fast


def _fits(base: Any) -> bool:
    multiple = MULTIPLE if _nf4(base) is None else BLOCK
    return base.in_features % multiple == 0 and base.out_features % MULTIPLE == 0


def _nf4(base: Any) -> Any:
    return getattr(base.weight, "quant_state", None)


class Fp8Products:
    """The products of a group of linears in FP8. `fast`: sum with fewer bits."""

    plain = False
    fast = False

    def __init__(self, bases: Sequence[Any]) -> None:
        self.biases = [base.bias for base in bases]
        self.weights = [Nf4Weight(base) if _nf4(base) else Fp8Weight(base) for base in bases]
        self.ones = torch.ones(bases[0].in_features, device=bases[0].weight.device)

    def outputs(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        rows, scale = quantize([x])
        for weight, bias in zip(self.weights, self.biases, strict=True):
            out = self.output(rows, scale, weight, x.dtype)
            yield out if bias is None else out.add_(bias.to(x.dtype))

    def output(
        self,
        rows: torch.Tensor,
        scale: torch.Tensor,
        weight: "Fp8Weight | Nf4Weight",
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the product (N, out) of quantized inputs with one of the weights."""
        return multiply(rows, scale, weight.by_output(), weight.scale, dtype, self.fast)

    def input_gradient(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [
            (rows, weight)
            for rows, weight in zip(gradients, self.weights, strict=True)
            if rows is not None
        ]
        if not present:
            return None
        given, weights = zip(*present, strict=True)
        rows, scale = quantize(given, [weight.scale for weight in weights])
        return self.gradient_of(rows, scale, weights, given[0].dtype)

    def gradient_of(
        self,
        rows: torch.Tensor,
        scale: torch.Tensor,
        weights: "Sequence[Fp8Weight | Nf4Weight]",
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the gradient (N, in) of quantized gradients (N, outputs of all `weights`)."""
        inputs, outputs = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
        side_by_side = torch.empty(inputs, outputs, dtype=E4M3, device=rows.device)
        begin = 0
        for weight in weights:
            end = begin + weight.shape[0]
            weight.write_by_input(side_by_side[:, begin:end])
            begin = end
        return multiply(rows, scale, side_by_side, self.ones, dtype, self.fast)


class Fp8Weight:
    """A linear's 16-bit weight, replaced by its FP8 numbers; `scale` (out,) is in fp32."""

    def __init__(self, base: Any) -> None:
        numbers, scale = quantize([base.weight.data])
        base.weight = torch.nn.Parameter(numbers, requires_grad=False)
        self.base = base
        self.scale = scale.flatten()
        self.shape = numbers.shape

    def by_output(self) -> torch.Tensor:
        """Return the FP8 numbers (out, in)."""
        return self.base.weight.data

    def write_by_input(self, into: torch.Tensor) -> None:
        """Write the FP8 numbers, transposed to (in, out)."""
        if into.is_cuda:
            _kernels().transpose(self.by_output(), into)
        else:
            into.copy_(self.by_output().T)


class Nf4Weight:
    """A linear's NF4 weight, whose FP8 numbers are made when they are needed."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.shape = tuple(_nf4(base).shape)
        # NF4's own numbers end at 1, so a block's scale is its largest absolute value.
        largest = kept_scales(base).view(self.shape[0], -1).amax(1).clamp(min=SMALLEST)
        self.scale = largest / LARGEST
        self.inverse = LARGEST / largest
        self.code = _nf4(base).code.float()

    def by_output(self) -> torch.Tensor:
        """Return the FP8 numbers (out, in)."""
        numbers = torch.empty(self.shape, dtype=E4M3, device=self.scale.device)
        self._write(numbers, transposed=False)
        return numbers

    def write_by_input(self, into: torch.Tensor) -> None:
        """Write the FP8 numbers, transposed to (in, out)."""
        self._write(into, transposed=True)

    def _write(self, into: torch.Tensor, transposed: bool) -> None:
        if into.is_cuda:
            packed, scales = self.base.weight.data, kept_scales(self.base)
            _kernels().from_nf4(
                packed, scales, self.code, self.inverse, self.shape, into, transposed
            )
            return
        numbers = dense_weight(self.base, torch.float32) * self.inverse[:, None]
        into.copy_((numbers.T if transposed else numbers).to(E4M3))


def quantize(
    parts: Sequence[torch.Tensor], factors: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put matrices side by side and quantize each row: (rows, all columns) e4m3, (rows, 1) fp32.

    factors: numbers that the columns of each matrix are multiplied with first.
    """
    if parts[0].is_cuda:
        return _kernels().quantize(parts, factors)
    scaled = [part.float() for part in parts]
    if factors:
        scaled = [part * factor for part, factor in zip(scaled, factors, strict=True)]
    rows = torch.cat(scaled, 1)
    largest = rows.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
    return (rows * (LARGEST / largest)).to(E4M3), largest / LARGEST


def multiply(
    left: torch.Tensor,
    left_scale: torch.Tensor,
    right: torch.Tensor,
    right_scale: torch.Tensor,
    dtype: torch.dtype,
    fast: bool = False,
) -> torch.Tensor:
    """Return (diag(left_scale) left) (diag(right_scale) right)ᵀ in `dtype`.

    left: (N, K). right: (M, K). left_scale: (N, 1). right_scale: (M,). The result is (N, M).
    """
    if left.is_cuda:
        out: torch.Tensor = torch.ops.aten._scaled_mm(
            left,
            right.t(),
            left_scale,
            right_scale[None],
            out_dtype=torch.bfloat16,  # the one dtype that it has for scales by row
            use_fast_accum=fast,
        )
        return out.to(dtype)
    return ((left.float() @ right.float().T) * left_scale * right_scale).to(dtype)


def _kernels() -> Any:
    # Triton is there only with a GPU build of torch.
    from ft_assets.training import fp8_kernels

    return fp8_kernels
