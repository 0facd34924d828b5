"""A model's shape, from its config.json and the headers of its weight files. No torch.

Memory and arithmetic are computed from it.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ft_assets.config.training import ALL_LINEAR, TARGETS
from ft_assets.errors import ModelError
from ft_assets.models.config_keys import size, text_config
from ft_assets.models.targets import EXPERT_LAYERS
from ft_assets.models.text_part import stored_names


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture: their number, those that a token goes through, and their width.

    parameters: of all experts. They are one tensor a layer in memory, which NF4 leaves in 16 bits.
    """

    count: int
    per_token: int
    width: int
    parameters: int


@dataclass(frozen=True)
class Recurrence:
    """The gated delta rule of a hybrid (Qwen3-Next, Qwen3.5), and the number of such layers.

    key, value: numbers of all key heads and all value heads of a token. heads: value heads.
    key_dim: of one head.
    """

    layers: int
    heads: int
    key_dim: int
    key: int
    value: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    intermediate: of the dense MLP; of a mixture, of its shared expert. linear_parameters: of the
    layers' matrices, which NF4 quantizes. other_parameters: the rest, without the experts.
    tensors: the sizes of each tensor by its name, if the weights are present.
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
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = field(default=(), compare=False, repr=False)
    model_type: str = "llama"
    experts: Experts | None = None
    recurrence: Recurrence | None = None

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        experts = self.experts.parameters if self.experts else 0
        return self.linear_parameters + experts + self.other_parameters

    @property
    def multiplied(self) -> int:
        """The parameters that each token is multiplied with: the layers' matrices and the head.

        Of a mixture only the experts that a token goes through.
        """
        experts = self.experts
        used = experts.parameters * experts.per_token // experts.count if experts else 0
        return self.linear_parameters + used + self.vocabulary * self.hidden

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
        sizes = self._stored_targets(targets) or self.layers * self.targets(targets)
        return sum(r * (read + made) + dora * made for read, made in sizes)

    def _stored_targets(self, targets: str | Sequence[str]) -> list[tuple[int, int]]:
        """Return (in, out) of each target among the tensors of the layers."""
        every = targets == ALL_LINEAR
        names = set() if every else set(TARGETS[targets] if isinstance(targets, str) else targets)
        found = []
        for tensor, sizes in self.tensors:
            path = tensor.removesuffix(".weight")
            name = path.rpartition(".")[2]
            if ".layers." not in tensor or len(sizes) != 2 or path == tensor:
                continue
            if self.experts and (".experts." in tensor or name in EXPERT_LAYERS):
                continue
            if every or name in names:
                found.append((sizes[1], sizes[0]))
        return found

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
            (f"layers.{layer}.{name}.weight", sizes)
            for layer in range(self.layers)
            for name, sizes in self.linears().items()
        )
        return {
            name: sum(
                math.prod(sizes)
                for tensor, sizes in known
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
    experts = _experts(text, layers, hidden)
    intermediate = size(text, "intermediate_size") or 4 * hidden
    if experts:
        intermediate = size(text, "shared_expert_intermediate_size") or 0
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
        model_type=text.get("model_type", "llama"),
        experts=experts,
        recurrence=_recurrence(text, layers),
    )


def _experts(text: Mapping[str, Any], layers: int, hidden: int) -> Experts | None:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((text[name] for name in names if text.get(name)), 0)
    if not count:
        return None
    width = size(text, "moe_intermediate_size") or size(text, "intermediate_size") or hidden
    each = text.get("num_experts_per_tok") or 1
    return Experts(count, each, width, layers * count * 3 * hidden * width)


def _recurrence(text: Mapping[str, Any], layers: int) -> Recurrence | None:
    heads = text.get("linear_num_value_heads")
    if not heads:
        return None
    kinds = text.get("layer_types") or []
    key_dim, value_dim = text["linear_key_head_dim"], text["linear_value_head_dim"]
    return Recurrence(
        layers=kinds.count("linear_attention") if kinds else layers,
        heads=heads,
        key_dim=key_dim,
        key=text["linear_num_key_heads"] * key_dim,
        value=heads * value_dim,
    )


def snapshot_shape(snapshot: Path) -> Shape:
    """Read the shape of a snapshot, and count its parameters in its safetensors headers.

    Of a model that also sees or hears, only the tensors of the text part count.
    """
    shape = shape_of(json.loads((snapshot / "config.json").read_text()))
    linear = experts = other = 0
    tensors = _of_text_part(_tensors(snapshot), stored_names(snapshot))
    for name, sizes in tensors:
        count = math.prod(sizes)
        if len(sizes) < 2 or ".layers." not in name:
            other += count
        elif shape.experts and ".experts." in name:
            experts += count
        else:
            linear += count
    if not linear:
        return shape
    return replace(
        shape,
        linear_parameters=linear,
        other_parameters=other,
        experts=replace(shape.experts, parameters=experts) if shape.experts else None,
        tensors=tuple(tensors),
    )


def _of_text_part(
    tensors: list[tuple[str, tuple[int, ...]]], names: Mapping[str, str]
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the tensors of the text part, whose names in the files are `names`; all without it.

    Experts have no names of their own there: all tensors of the text part's layers count.
    """
    if not names:
        return tensors
    stored = set(names.values())
    layers = {f"{name.partition('.layers.')[0]}.layers." for name in stored if ".layers." in name}
    return [
        (name, sizes) for name, sizes in tensors if name in stored or name.startswith(tuple(layers))
    ]


def _paths(tensor: str) -> Iterator[str]:
    """Yield the paths of the modules that hold a tensor: a.b.c.weight is in a, a.b and a.b.c."""
    parts = tensor.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _tensors(snapshot: Path) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = []
    for path in sorted(snapshot.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        found += [
            (name, tuple(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    return found
