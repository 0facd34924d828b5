"""Check that the merge finds a model's weights in its files.

An adapter names modules, while the merge reads and writes files. Most models have one set of names.
The snapshot of a model with parts records the names of its text part. Weights that transformers
joins when it loads them, such as fused experts, have no name in the files.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ft_assets.errors import ModelError
from ft_assets.models.text_part import stored_names

HEAD = re.compile(r"(^|\.)lm_head\.weight$")  # a tied head has no tensor of its own


def linear_weights(model: Any) -> list[str]:
    """Return the names of the weights of a model's linear layers, except the head's."""
    import torch

    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return [name for name in names if not HEAD.search(name)]


def unstored(names: Iterable[str], snapshot: Path) -> list[str]:
    """Return the names of weights that the snapshot's files do not have, except a tied head's."""
    from safetensors import safe_open

    renamed = stored_names(snapshot)
    stored: set[str] = set()
    for path in snapshot.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored.update(file.keys())
    return [
        name for name in names if renamed.get(name, name) not in stored and not HEAD.search(name)
    ]


def refuse_renamed(where: str, model: Any, renamed: list[str]) -> None:
    """Raise ModelError if there are weights that have other names in the files."""
    if renamed:
        raise ModelError(
            where=where,
            found=f"{type(model).__name__}: {len(renamed)} weights to train have other names in "
            f"its files than in memory, e.g. {renamed[0]}, so that an adapter could not be merged",
            expected="a causal language model whose modules have the names of its files",
            fix="name layers in lora.target_modules whose weights the files have, such as those of "
            "attention",
        )
