"""What an adapter does to each tensor of its base: read from its files, computed in fp32 on any range of rows.

LoRA (Hu et al. 2021): W + s·BA, s = alpha / r; rsLoRA (Kalajdzievski 2023): s = alpha / √r. DoRA (Liu et al. 2024): each
row of that scaled to its learnt magnitude. modules_to_save and trained token rows replace what they name. Kinds that
cannot be folded into weights, or start from other weights than the base's, are refused by name.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ft_assets.errors import ModelError
from ft_assets.merging.tensor_files import Entry, TensorFile, read_file, read_tensor

Apply = Callable[
    [torch.Tensor, int], torch.Tensor
]  # (fp32 rows of the base, number of the first) -> fp32 rows
PREFIX = "base_model.model."
HEAD, EMBEDDING = re.compile(r"(^|\.)lm_head\.weight$"), re.compile(r"(^|\.)embed_tokens\.weight$")
REFUSED = {
    "target_parameters": "LoRA on parameters of fused experts",
    "lora_bias": "a bias beside B",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "aLoRA, which acts from a token on",
    "arrow_config": "Arrow, which routes tokens",
    "use_bdlora": "block-diagonal LoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "replicated layers",
}
OTHER_START = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "mica",
    "lora_ga",
)  # initialisations that change the base's weights


@dataclass(frozen=True)
class Update:
    """How one tensor changes. `load` reads the adapter's part of it."""

    kind: str  # lora, replaced, rows
    load: Callable[[], Apply]


@dataclass(frozen=True)
class Updates:
    """All changes by the base's tensor name. `untie`: the head is no longer the embedding, and gets a tensor of its own."""

    changes: Mapping[str, Update] = field(default_factory=dict)
    untie: bool = False


def read_updates(adapter: Path, base: Mapping[str, Entry], tied: bool) -> Updates:
    """Return what the adapter changes in a base with these tensors. Raises ModelError if they do not fit or the kind is refused.

    `tied`: the base's head is its embedding. The adapter may have changed one of them alone, as PEFT computes it; then they part.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    _refuse(adapter, config)
    file = read_file(adapter / "adapter_model.safetensors")
    changes: dict[str, Update] = {}
    used: set[str] = set()
    for name in file.entries:
        found = _update(name, file, config)
        if found is not None:
            target, update, names = found
            changes[target] = update
            used |= names
    left = sorted(set(file.entries) - used)
    if left:
        raise ModelError(where=str(adapter), found=f"holds {len(left)} tensors of an unknown kind, e.g. {left[0]}", expected="LoRA, DoRA, modules_to_save, trained tokens", fix="train with one of these")  # fmt: skip
    embedding = next((name for name in base if EMBEDDING.search(name)), None)
    head = next((name for name in changes if HEAD.search(name)), "lm_head.weight")
    untie = False
    if (
        tied
        and embedding is not None
        and head not in base
        and (head in changes or embedding in changes)
    ):
        if config.get("ensure_weight_tying") or (
            embedding in changes and changes[embedding].kind == "rows"
        ):
            changes.pop(head, None)  # the same change, seen from the other side
        else:
            untie = True
    known = {*base, head} if untie else set(base)
    missing = sorted(set(changes) - known)
    if missing:
        raise ModelError(
            where=str(adapter),
            found=f"{len(missing)} modules have no weight in the base, e.g. {missing[0]}",
            expected=f"an adapter of {next(iter(base.values())).file.parent if base else 'this base'}",
            fix="merge it into the base it was trained on",
        )
    return Updates(changes, untie)


def _refuse(adapter: Path, config: Mapping[str, Any]) -> None:
    kinds = [text for key, text in REFUSED.items() if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(OTHER_START):
        kinds.append(f"init_lora_weights {start}, which starts from other weights than the base's")
    if config.get("peft_type") != "LORA":
        kinds.append(f"peft_type {config.get('peft_type')}")
    if kinds:
        raise ModelError(
            where=str(adapter),
            found=f"cannot be merged: {', '.join(kinds)}",
            expected="LoRA, rsLoRA, DoRA, modules_to_save, trained tokens",
            fix="train with one of these",
        )


def _target(name: str) -> str | None:
    """Return the base's tensor that this tensor of the adapter leads (of A and B, A leads); None for one that follows."""
    module = name.removeprefix(PREFIX)
    for ending in (".lora_A.weight", ".lora_embedding_A", ".token_adapter.trainable_tokens_delta"):
        if module.endswith(ending):
            return module.removesuffix(ending) + ".weight"
    if "lora_" in module or ".base_layer." in module or not name.startswith(PREFIX):
        return None
    return module


def _update(
    name: str, file: TensorFile, config: Mapping[str, Any]
) -> tuple[str, Update, set[str]] | None:
    target = _target(name)
    if target is None:
        return None
    module, entries = target.removesuffix(".weight"), file.entries
    if name.endswith("trainable_tokens_delta"):
        return (
            target,
            Update("rows", lambda: _rows(entries[name], _token_ids(config, module))),
            {name},
        )
    if "lora_" not in name:
        return target, Update("replaced", lambda: _replace(entries[name])), {name}
    across = name.endswith("lora_embedding_A") or bool(config.get("fan_in_fan_out"))
    partner = name.replace("lora_embedding_A", "lora_embedding_B").replace(
        "lora_A.weight", "lora_B.weight"
    )
    magnitude = f"{PREFIX}{module}.lora_magnitude_vector"
    if partner not in entries or (across and magnitude in entries):
        raise ModelError(
            where=f"{file.path}: {name}",
            found="DoRA on an embedding or a transposed layer"
            if partner in entries
            else f"there is no {partner}",
            expected="A and B of a linear layer, or of an embedding without DoRA",
            fix="leave it out of lora.target_modules"
            if partner in entries
            else "the file is damaged: train it again",
        )
    scale = scaling(module, entries[name].shape[0], config)
    length = entries.get(magnitude)
    if length is None and (other := entries.get(f"{magnitude}.weight")) is not None:
        magnitude, length = f"{magnitude}.weight", other
    names = {
        name,
        partner,
        *([magnitude] if length else []),
        f"{PREFIX}{module}.base_layer.weight",
    }  # the last: the base's, unchanged
    return (
        target,
        Update("lora", lambda: _low_rank(entries[name], entries[partner], length, scale, across)),
        names,
    )


def scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """Return s of W + s·BA for a module whose A has `rank` rows; alpha_pattern's keys are matched as PEFT does."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
        config["lora_alpha"],
    )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _token_ids(config: Mapping[str, Any], module: str) -> list[int]:
    given = config["trainable_token_indices"]
    if isinstance(given, dict):
        return next(
            ids for key, ids in given.items() if module == key or module.endswith(f".{key}")
        )
    return list(given)


def _low_rank(
    low: Entry, high: Entry, magnitude: Entry | None, scale: float, across: bool
) -> Apply:
    a, b = read_tensor(low).float(), read_tensor(high).float()  # (r, in), (out, r)
    m = read_tensor(magnitude).float().reshape(-1, 1) if magnitude is not None else None

    def apply(rows: torch.Tensor, first: int) -> torch.Tensor:
        part = slice(first, first + rows.shape[0])
        delta = a[:, part].T @ b.T if across else b[part] @ a
        # Not addmm: product, scale and sum each rounded, as PEFT does it, and the bits are the same.
        updated = delta.mul_(scale).add_(rows)
        if m is not None:
            updated.mul_(m[part] / torch.linalg.norm(updated, dim=1, keepdim=True))
        return updated

    return apply


def _replace(entry: Entry) -> Apply:
    whole = read_tensor(entry)
    return lambda rows, first: (
        whole[first : first + rows.shape[0]].float() if rows.dim() else whole.float()
    )


def _rows(entry: Entry, ids: list[int]) -> Apply:
    trained = read_tensor(entry).float()

    def apply(rows: torch.Tensor, first: int) -> torch.Tensor:
        here = [
            (index, token - first)
            for index, token in enumerate(ids)
            if first <= token < first + rows.shape[0]
        ]
        for index, row in here:
            rows[row] = trained[index]
        return rows

    return apply
