"""The linear layers of a decoder with their adapters, several at once.

The results are those of PEFT's layers, with fewer kernels. PEFT computes each target alone: it
copies the base's output, drops out its own copy of the input, scales and adds. Here the layers
that share an input (q, k, v; gate, up) are one operation: one dropout, one product with all A, B
added in place by the matrix product itself, and one gradient of the input that is accumulated in
place.

One difference from PEFT: with dropout, layers that share an input share its mask. The mask is not
stored but drawn again in the backward pass.

Only for what can be computed exactly: plain (rs)LoRA, one active adapter, not merged, NF4 or
unquantized bases. For anything else (DoRA, disabled adapters, mixed batches) a layer's own forward
runs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from ft_assets.compat.peft import ActiveLora, active_lora, is_plain
from ft_assets.models.decoder import layers_of
from ft_assets.training.base_products import BaseProducts, DenseProducts

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_linears(model: Any) -> int:
    """Replace the forward of the decoder layers' linears. Returns the number of fused linears."""
    fused = 0
    for layer in layers_of(model):
        for parent in _parents(layer):
            children = {name: child for name, child in parent.named_children() if _simple(child)}
            grouped = [tuple(name for name in names if name in children) for names in SHARED_INPUT]
            alone = [(name,) for name in children if not any(name in names for names in grouped)]
            for names in (*filter(None, grouped), *alone):
                group = LinearGroup([children[name] for name in names])
                for index, name in enumerate(names):
                    children[name].forward = functools.partial(
                        group.forward, index, children[name].forward
                    )
                fused += len(names)
    return fused


def _parents(module: Any) -> Iterator[Any]:
    """Yield a module and all modules below it, but none inside an adapter's layer."""
    if isinstance(module, LoraLayer):
        return
    yield module
    for child in module.children():
        yield from _parents(child)


def _simple(module: Any) -> bool:
    base = module.base_layer if isinstance(module, LoraLayer) else module
    if isinstance(module, LoraLayer) and not is_plain(module):
        return False
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return False  # fully trained: lora.modules_to_save
    return type(base) is torch.nn.Linear or type(base).__name__ == "Linear4bit"


class LinearGroup:
    """Linears that share an input.

    The first call computes all of them. The others take their outputs, if the input is the same.
    """

    def __init__(self, members: list[Any]) -> None:
        self.members = members
        self.bases = [_base(member) for member in members]
        self.products: BaseProducts = DenseProducts(self.bases)
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def forward(
        self, index: int, plain: Any, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the output (B, T, out) of member `index` for `x` (B, T, in)."""
        if self.products.plain and (args or kwargs):
            return plain(x, *args, **kwargs)
        if self._input is x and index in self._outputs:
            out = self._outputs.pop(index)
            if not self._outputs:
                self._input = None
            return out
        adapters = _adapters(self.members)
        if adapters is None and self.products.plain:
            return plain(x)
        if adapters is None or args or kwargs:
            raise NotImplementedError("FP8 base weights are computed with one active adapter only")
        outputs = _compute(x, self.products, adapters)
        self._outputs = {other: out for other, out in enumerate(outputs) if other != index}
        self._input = x if self._outputs else None
        return outputs[index]

    def forget(self) -> None:
        """Drop the outputs that an interrupted pass has left.

        They hold the autograd graph, and so its activations.
        """
        self._input = None
        self._outputs = {}


def linear_groups(model: Any) -> list[LinearGroup]:
    """Return the groups of a model whose linears are fused, each once; else an empty list."""
    groups = {id(group): group for module in model.modules() if (group := group_of(module))}
    return list(groups.values())


def adapters_are_fused(model: Any) -> bool:
    """Return True if no adapter's layer runs PEFT's own forward."""
    return all(group_of(module) for module in model.modules() if isinstance(module, LoraLayer))


def group_of(module: Any) -> LinearGroup | None:
    """Return the group of a fused linear; None for any other module."""
    owner = getattr(getattr(module.__dict__.get("forward"), "func", None), "__self__", None)
    return owner if isinstance(owner, LinearGroup) else None


def _base(member: Any) -> Any:
    return member.base_layer if isinstance(member, LoraLayer) else member


def _adapters(members: list[Any]) -> list[ActiveLora | None] | None:
    """Return each member's active adapter, None for a member without one.

    Returns None instead of the list if PEFT must compute a member.
    """
    adapters: list[ActiveLora | None] = []
    for member in members:
        adapter = active_lora(member) if isinstance(member, LoraLayer) else None
        if adapter is None and isinstance(member, LoraLayer):
            return None
        adapters.append(adapter)
    return adapters


def _compute(
    x: torch.Tensor, products: BaseProducts, adapters: Sequence[ActiveLora | None]
) -> tuple[torch.Tensor, ...]:
    present = [adapter for adapter in adapters if adapter]
    dropout = max((adapter.dropout for adapter in present), default=0.0)
    seed = _draw(x.device) if dropout else 0
    scales = [adapter.scale if adapter else None for adapter in adapters]
    weights = [tensor for adapter in present for tensor in (adapter.a, adapter.b)]
    outputs: tuple[torch.Tensor, ...]
    outputs = _Linears.apply(x, products, scales, dropout, seed, *weights)
    # Outside of the function: autograd does not allow a model to add to a view made inside of it.
    return tuple(out.view(*x.shape[:-1], -1) for out in outputs)


def _draw(device: torch.device) -> int:
    """Return the state that `_drop` draws its mask from.

    Activation checkpointing restores both generators for a recomputed layer.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index].get_offset()
    return int(torch.randint(2**62, ()))


def _drop(
    x: torch.Tensor, dropout: float, drawn: int, again: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x after dropout, the boolean mask of what was not dropped).

    A share of `dropout` is set to 0 and the rest is scaled. `again`: draw the same mask as before.
    """
    if x.device.type == "cuda":
        generator = torch.cuda.default_generators[x.device.index]
        now = generator.get_offset()
        if again:
            generator.set_offset(drawn)
        dropped, keep = torch.native_dropout(x, dropout, True)
        if again:
            generator.set_offset(now)
        return dropped, keep
    generator = torch.Generator().manual_seed(drawn)
    keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - dropout, generator=generator)
    return x * keep / (1 - dropout), keep


class _Linears(torch.autograd.Function):
    """y_i = x W_iᵀ + bias_i + s_i (drop(x) A_iᵀ) B_iᵀ for all members; the base is frozen.

    x: (B, T, in). W_i: (out_i, in). A_i: (r_i, in). B_i: (out_i, r_i). y_i: (B · T, out_i).
    Inside, the B · T positions are N rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        products: BaseProducts,
        scales: list[float | None],
        dropout: float,
        seed: int,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, in)
        ctx.products = products
        ctx.scales = scales
        ctx.dropout = dropout
        ctx.seed = seed
        ctx.shape = x.shape
        ctx.dtype = dtype
        ctx.input_dtype = x.dtype
        low = None
        if weights:
            dropped = _drop(flat, dropout, seed, again=False)[0] if dropout else flat
            low = dropped @ torch.cat([a.to(dtype) for a in weights[::2]]).T  # (N, sum of r)
            ctx.save_for_backward(flat, low, *weights)
            del dropped
        outputs = []
        rank = 0
        pair = 0
        for out, scale in zip(products.outputs(flat), scales, strict=True):
            if scale is not None:
                assert low is not None
                b = weights[pair + 1]
                out.addmm_(low[:, rank : rank + b.shape[1]], b.to(dtype).T, alpha=scale)
                rank += b.shape[1]
                pair += 2
            outputs.append(out)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        none: Any = None
        flat, low, weights = (saved[0], saved[1], saved[2:]) if saved else (none, none, ())
        dtype = ctx.dtype
        grads = [
            None if gradient is None else gradient.reshape(-1, gradient.shape[-1]).to(dtype)
            for gradient in gradients
        ]
        # The gradient of x, (N, in).
        into = ctx.products.input_gradient(grads) if ctx.needs_input_grad[0] else None
        ups = []  # the gradients of the low-rank products, (N, r) each
        back = []  # the gradients of B, (out, r) each
        rank = 0
        pair = 0
        for rows, scale in zip(grads, ctx.scales, strict=True):
            if scale is None:
                continue
            b = weights[pair + 1]
            if rows is None:
                ups.append(low.new_zeros(low.shape[0], b.shape[1]))
                back.append(torch.zeros_like(b))
            else:
                ups.append((rows @ b.to(dtype)).mul_(scale))
                back.append((rows.T @ low[:, rank : rank + b.shape[1]]).mul_(scale).to(b.dtype))
            rank += b.shape[1]
            pair += 2
        result: list[Any] = []
        if ups:
            up = torch.cat(ups, 1)  # (N, sum of r)
            dropped, keep = flat, None
            if ctx.dropout:
                dropped, keep = _drop(flat, ctx.dropout, ctx.seed, again=True)
            down = up.T @ dropped  # the gradients of all A, (sum of r, in)
            del dropped
            rank = 0
            for a, db in zip(weights[::2], back, strict=True):
                result += [down[rank : rank + a.shape[0]].to(a.dtype), db]
                rank += a.shape[0]
            if into is not None:
                stacked = torch.cat([a.to(dtype) for a in weights[::2]])
                into = (
                    into.addmm_(up, stacked)
                    if keep is None
                    else into.addcmul_(up @ stacked, keep, value=1 / (1 - ctx.dropout))
                )
        dx = into.reshape(ctx.shape).to(ctx.input_dtype) if into is not None else None
        return (dx, None, None, None, None, *result)
