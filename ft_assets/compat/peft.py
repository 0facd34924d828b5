"""The inside of PEFT's LoRA layers; pyproject.toml bounds PEFT at its next minor version."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ActiveLora:
    """The one active adapter of a LoRA layer.

    `a`: (r, in) and `b`: (out, r). `scale`: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.
    `dropout`: the probability in training mode, 0 in evaluation mode.
    """

    a: Any
    b: Any
    scale: float
    dropout: float


def is_plain(layer: Any) -> bool:
    """Return True if a LoRA layer adds scale · B A x to its base layer and nothing else.

    False for DoRA and PEFT's other variants, and for an adapter with a bias.
    """
    return not (layer.lora_variant or any(layer.use_dora.values()) or any(layer.lora_bias.values()))


def active_lora(layer: Any) -> ActiveLora | None:
    """Return the one active adapter of a LoRA layer.

    None if the layer is disabled or merged, or if several adapters or none are active.
    """
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name = active[0]
    dropout = layer.lora_dropout[name]
    return ActiveLora(
        a=layer.lora_A[name].weight,
        b=layer.lora_B[name].weight,
        scale=float(layer.scaling[name]),
        dropout=getattr(dropout, "p", 0.0) if layer.training and dropout.training else 0.0,
    )
