"""The linears of a decoder with their LoRA adapter, in fewer kernels than PEFT's.

y = x Wᵀ + s (x Aᵀ) Bᵀ. The layers that share an input multiply it with all A at once, and the
product with B is added in place. A and B are cast to the dtype of the base, so the product is that
of training under autocast.
Not here: DoRA, several active adapters, and all else that PEFT computes itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from ft_assets.compat.peft import active_lora, is_plain

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class _Group:
    """The layers that share an input. `a`: all A stacked, (sum of r, in)."""

    a: torch.Tensor
    members: int
    input: torch.Tensor | None = None
    low: torch.Tensor | None = None
    asked: int = 0

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Aᵀ (N, sum of r), computed for the first member that asks."""
        if self.input is not x or self.low is None:
            self.input, self.asked = x, 0
            self.low = x.reshape(-1, x.shape[-1]).to(self.a.dtype) @ self.a.T
        low = self.low
        self.asked += 1
        if self.asked == self.members:
            self.input = self.low = None
        return low


@dataclass(frozen=True)
class _Fused:
    """One layer. `ranks`: its columns of the group's product. `b`: (r, out)."""

    group: _Group
    ranks: slice
    b: torch.Tensor
    scale: float
    base: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(self.group.low_rank(x)[:, self.ranks], self.b, alpha=self.scale)
        return out


@dataclass(frozen=True)
class FusedAdapters:
    """The fused layers of the adapter that is active when this is made."""

    layers: list[tuple[Any, _Fused]] = field(default_factory=list)

    @classmethod
    def of(cls, model: Any) -> "FusedAdapters":
        """Return those of a model; none for a model without an active adapter."""
        layers: list[tuple[Any, _Fused]] = []
        for parent in model.modules():
            plain = {name: child for name, child in parent.named_children() if _is_plain(child)}
            shared = [tuple(name for name in names if name in plain) for names in SHARED_INPUT]
            alone = [(name,) for name in plain if not any(name in names for names in shared)]
            for names in (*filter(None, shared), *alone):
                layers += _fuse([plain[name] for name in names])
        return cls(layers)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Context in which the layers' forward is the fused one."""
        for layer, fused in self.layers:
            layer.forward = fused
        try:
            yield
        finally:
            for layer, _ in self.layers:
                del layer.forward


def _is_plain(module: Any) -> bool:
    return (
        isinstance(module, LoraLayer)
        and type(module.base_layer) is torch.nn.Linear
        and "forward" not in module.__dict__
        and is_plain(module)
        and active_lora(module) is not None
    )


def _fuse(layers: list[Any]) -> Iterator[tuple[Any, _Fused]]:
    adapters = [adapter for layer in layers if (adapter := active_lora(layer)) is not None]
    dtype = layers[0].base_layer.weight.dtype
    group = _Group(torch.cat([adapter.a.to(dtype) for adapter in adapters]), len(layers))
    rank = 0
    for layer, adapter in zip(layers, adapters, strict=True):
        ranks = slice(rank, rank := rank + adapter.a.shape[0])
        b = adapter.b.to(dtype).T.contiguous()
        yield layer, _Fused(group, ranks, b, adapter.scale, layer.base_layer)
