"""Read sizes from a parsed config.json, under the names that families give them.

transformers maps these names too, but importing it takes seconds.
"""

from collections.abc import Mapping
from typing import Any

# The usual name of a size, and the names of older or recurrent families (GPT-2, MPT, Mamba).
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "mamba_n_heads"),
    "intermediate_size": ("n_inner", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config; of a model with parts, those of its text part come first."""
    return {**config, **(config.get("text_config") or {})}


def size(config: Mapping[str, Any], name: str) -> int | None:
    """Return a size by its usual name, the largest if there is one a layer; None if it has none."""
    found = (config.get(key) for key in (name, *OTHER_NAMES.get(name, ())))
    value = next((value for value in found if value is not None), None)
    return max(value) if isinstance(value, list) else value
