"""A model's shape, from its config.json and the headers of its weight files. No torch.

Memory and arithmetic are computed from it.
"""

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ft_assets.config.training import TARGETS
from ft_assets.errors import ModelError
from ft_assets.models.config_keys import size, text_config


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    linear_parameters: of the layers' matrices, which NF4 quantizes. other_parameters: the rest.
    tensors: the size of each tensor by its name, if the weights are present.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    linear_parameters: int
    other_parameters: int
    tensors: tuple[tuple[str, int], ...] = field(default=(), compare=False, repr=False)

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def multiplied(self) -> int:
        """The parameters that each token is multiplied with: the layers' matrices and the head."""
        return self.linear_parameters + self.vocabulary * self.hidden

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (in, out) of a layer's matrices by name."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def targets(self, targets: str | Sequence[str]) -> list[tuple[int, int]]:
        """Return (in, out) of a layer's targets. An unknown name counts as a square matrix."""
        sizes = self.linears()
        return [
            sizes.get(name, (self.hidden, self.hidden))
            for name in (TARGETS[targets] if isinstance(targets, str) else targets)
        ]

    def adapter_parameters(self, r: int, targets: str | Sequence[str], dora: bool = False) -> int:
        """Return r (in + out) summed over all targets; with DoRA also a magnitude per output."""
        return self.layers * sum(
            r * (read + made) + dora * made for read, made in self.targets(targets)
        )

    def module_parameters(self, names: Sequence[str]) -> dict[str, int]:
        """Return the parameters that PEFT copies for each name in lora.modules_to_save.

        They are those of all modules whose path ends with the name. Tied or not, PEFT copies
        embeddings and head separately; a tied head is not among the tensors.
        """
        ends = {
            "embed_tokens": self.vocabulary * self.hidden,
            "lm_head": self.vocabulary * self.hidden,
        }
        known = self.tensors or tuple(
            (f"layers.{layer}.{name}.weight", read * made)
            for layer in range(self.layers)
            for name, (read, made) in self.linears().items()
        )
        return {
            name: sum(
                count
                for tensor, count in known
                if any(path.endswith(name) for path in _paths(tensor))
            )
            or ends.get(name, 0)
            for name in names
        }


def shape_of(config: dict[str, Any]) -> Shape:
    """Read the shape from a parsed config.json; of a model with parts (vision), its text part."""
    text = text_config(config)
    hidden, layers = size(text, "hidden_size"), size(text, "num_hidden_layers")
    vocabulary = size(text, "vocab_size")
    if hidden is None or layers is None or vocabulary is None:
        raise ModelError(
            where="config.json of the base",
            found="has no hidden_size, num_hidden_layers or vocab_size",
            expected="the sizes of a decoder, from which its memory is planned",
            fix="name a base of another family",
        )
    heads = size(text, "num_attention_heads") or 1
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or hidden // heads
    intermediate = size(text, "intermediate_size") or 4 * hidden
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    tied = bool(text.get("tie_word_embeddings", False))
    return Shape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        tied=tied,
        linear_parameters=layers * (attention + 3 * hidden * intermediate),
        other_parameters=vocabulary * hidden * (1 if tied else 2) + (2 * layers + 1) * hidden,
    )


def snapshot_shape(snapshot: Path) -> Shape:
    """Read the shape of a snapshot, and count its parameters in its safetensors headers."""
    shape = shape_of(json.loads((snapshot / "config.json").read_text()))
    linear = 0
    other = 0
    tensors = [(name, sizes, math.prod(sizes)) for name, sizes in _tensors(snapshot)]
    for name, sizes, count in tensors:
        if len(sizes) >= 2 and ".layers." in name:
            linear += count
        else:
            other += count
    if not linear:
        return shape
    return replace(
        shape,
        linear_parameters=linear,
        other_parameters=other,
        tensors=tuple((name, count) for name, _, count in tensors),
    )


def _paths(tensor: str) -> Iterator[str]:
    """Yield the paths of the modules that hold a tensor: a.b.c.weight is in a, a.b and a.b.c."""
    parts = tensor.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _tensors(snapshot: Path) -> list[tuple[str, list[int]]]:
    found = []
    for path in sorted(snapshot.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        found += [
            (name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"
        ]
    return found
