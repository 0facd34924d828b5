"""A trained adapter (or trained weights) on disk: which kind it is, the rows it was trained on, what it changed."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

TRAINED_GROUPS = "trained_groups.json"


def is_full(adapter: Path) -> bool:
    """Return whether a trained artifact holds all weights instead of an adapter."""
    return not (adapter / "adapter_config.json").exists()


def copy_trained(source: Path, output: Path) -> None:
    """Copy a trained adapter or trained weights, and the list of rows, into another artifact."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in ("manifest.json", "whole.json"):
            shutil.copy2(path, output / path.name)


def save_groups(rows: Iterable[dict[str, Any]], output: Path, before: Path | None = None) -> None:
    """Write the groups of the rows an adapter was trained on (also those of the adapter it started from): the
    evaluation refuses to judge it on any of them."""
    groups = {row["group"] for row in rows} | (
        set(json.loads((before / TRAINED_GROUPS).read_text())) if before else set()
    )
    (output / TRAINED_GROUPS).write_text(json.dumps(sorted(groups), indent=0))


def changed_weights(
    trained: Path, snapshot: Path
) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, weight, the base's weight in its dtype) of each tensor that both hold, one at a time."""
    base = {name: path for path in sorted(snapshot.glob("*.safetensors")) for name in _names(path)}
    for path in sorted(trained.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in base:
                    with safe_open(base[name], framework="pt") as other:
                        weight = file.get_tensor(name)
                        yield name, weight, other.get_tensor(name).to(weight.dtype)


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
