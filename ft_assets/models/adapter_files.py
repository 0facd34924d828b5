"""Read and write the files of a trained adapter or of trained weights.

They include the groups of the trained rows, and give the weights that the training changed.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from ft_assets.rows.types import DataRow

TRAINED_GROUPS = "trained_groups.json"
SEEDS = "seeds"  # in a trained artifact and beside its checkpoints


def of_seed(folder: Path, number: int) -> Path:
    """Return the folder of the training with the `number`-th further seed; 0 is the folder itself.

    The weights of further seeds are never merged: they show how far a gain depends on the seed.
    """
    return folder / SEEDS / str(number) if number else folder


def is_full(adapter: Path) -> bool:
    """Return True if a trained artifact holds all weights instead of an adapter."""
    return not (adapter / "adapter_config.json").exists()


def copy_trained(source: Path, output: Path) -> None:
    """Copy a trained adapter or trained weights, and the list of rows, into another artifact."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in ("manifest.json", "whole.json"):
            shutil.copy2(path, output / path.name)


def save_groups(rows: Iterable[DataRow], output: Path, before: Path | None = None) -> None:
    """Write the groups of the rows that an adapter was trained on.

    They include the groups of the adapter `before`, from which the training started. The evaluation
    refuses to score the adapter on any of them.
    """
    groups = {row["group"] for row in rows}
    if before:
        groups.update(json.loads((before / TRAINED_GROUPS).read_text()))
    (output / TRAINED_GROUPS).write_text(json.dumps(sorted(groups), indent=0))


def changed_weights(
    trained: Path, snapshot: Path
) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, weight, the base's weight in the same dtype) of each tensor that both have.

    One tensor is in memory at a time.
    """
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
