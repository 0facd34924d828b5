"""Whether a model's weights are called in its files as they are in memory: an adapter names modules, the merge reads and writes files.

Of most models both names are one. Some that take pictures too (Gemma 3 from 4B on) are renamed by transformers when they are
loaded, and an adapter of theirs would be trained and judged, and could then not be merged.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ft_assets.errors import ModelError

HEAD = re.compile(r"(^|\.)lm_head\.weight$")  # has no tensor of its own where it is the embedding


def linear_weights(model: Any) -> list[str]:
    """Return the names of the weights of a model's linear layers, without the head's."""
    import torch

    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return [name for name in names if not HEAD.search(name)]


def unstored(names: Iterable[str], snapshot: Path) -> list[str]:
    """Return those of the names of weights that the snapshot's files do not hold; a head that is the embedding is not missed."""
    from safetensors import safe_open

    stored: set[str] = set()
    for path in snapshot.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored.update(file.keys())
    return [name for name in names if name not in stored and not HEAD.search(name)]


def refuse_renamed(where: str, model: Any, renamed: list[str]) -> None:
    """Raise ModelError if there are weights that have other names in the files."""
    if renamed:
        raise ModelError(
            where=where,
            found=f"{type(model).__name__}: {len(renamed)} weights to train have other names in its files than in memory, e.g. {renamed[0]}, "
            "so that what is trained could not be merged",
            expected="a causal language model whose modules are called as in its files",
            fix="name a text-only export of it: of Gemma 3 one of the class Gemma3ForCausalLM, as its GGUF files are",
        )
