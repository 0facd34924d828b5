"""Read the update of each tensor from an adapter's files, and compute it in fp32 on any rows.

LoRA (Hu et al. 2021): W + s·BA, s = alpha / r. rsLoRA (Kalajdzievski 2023): s = alpha / √r. DoRA
(Liu et al. 2024): each row of W + s·BA is scaled to its learnt magnitude. modules_to_save and
trained token rows replace the base's weights. An adapter that cannot be folded into weights, or
that was not initialised on the base's weights, is refused by name.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from ft_assets.artifacts.documents import read_document
from ft_assets.errors import ModelError
from ft_assets.merging.tensor_files import Entry, TensorFile, read_file, read_tensor

# (fp32 rows of the base, index of the first row) -> fp32 rows
Apply = Callable[[torch.Tensor, int], torch.Tensor]
PREFIX = "base_model.model."
HEAD = re.compile(r"(^|\.)lm_head\.weight$")
EMBEDDING = re.compile(r"(^|\.)embed_tokens\.weight$")
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
# Initialisations that change the base's weights.
CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")
MERGEABLE = "LoRA, rsLoRA, DoRA, modules_to_save, trained tokens"


@dataclass(frozen=True)
class Update:
    """The update of one tensor; `load` reads it from the adapter's file."""

    kind: Literal["lora", "replaced", "rows"]
    load: Callable[[], Apply]


@dataclass(frozen=True)
class Updates:
    """All updates by the base's tensor name.

    untie: the head is no longer the embedding, and gets its own tensor.
    """

    changes: Mapping[str, Update] = field(default_factory=dict)
    untie: bool = False


class AdapterConfig(BaseModel):
    """The keys of adapter_config.json that decide the updates."""

    model_config = ConfigDict(frozen=True)

    lora_alpha: float
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    ensure_weight_tying: bool | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


def read_updates(
    adapter: Path,
    base: Mapping[str, Entry],
    tied: bool,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Updates:
    """Read the updates of an adapter for a base with these tensors.

    names: the base's name of a tensor where the adapter has another (models/text_part.py). tied:
    the base's head is its embedding. PEFT can change one of the two alone; then the merge
    unties them. Raises ModelError if the adapter does not fit the base or cannot be merged.
    """
    config = _read_config(adapter)
    file = read_file(adapter / "adapter_model.safetensors")
    changes: dict[str, Update] = {}
    used: set[str] = set()
    for name in file.entries:
        found = _update(name, file, config)
        if found is not None:
            target, update, read = found
            changes[names.get(target, target)] = update
            used |= read
    unknown = sorted(set(file.entries) - used)
    if unknown:
        raise ModelError(
            where=str(adapter),
            found=f"holds {len(unknown)} tensors of an unknown kind, e.g. {unknown[0]}",
            expected=MERGEABLE,
            fix="train with one of these",
        )
    head = next((name for name in changes if HEAD.search(name)), "lm_head.weight")
    untie = _resolve_tying(changes, base, head, config) if tied else False
    known = {*base, head} if untie else set(base)
    missing = sorted(set(changes) - known)
    if missing:
        folder = next(iter(base.values())).file.parent if base else "this base"
        raise ModelError(
            where=str(adapter),
            found=f"{len(missing)} modules have no weight in the base, e.g. {missing[0]}",
            expected=f"an adapter of {folder}",
            fix="merge it into the base it was trained on",
        )
    return Updates(changes, untie)


def _resolve_tying(
    changes: dict[str, Update], base: Mapping[str, Entry], head: str, config: AdapterConfig
) -> bool:
    """Return True if head and embedding of a tied base must be untied.

    If the adapter keeps them tied, the head's own change is dropped from `changes`: it is the
    embedding's change, seen from the head.
    """
    embedding = next((name for name in base if EMBEDDING.search(name)), None)
    if embedding is None or head in base or not {head, embedding} & set(changes):
        return False
    trained_rows = embedding in changes and changes[embedding].kind == "rows"
    if config.ensure_weight_tying or trained_rows:
        changes.pop(head, None)
        return False
    return True


def _read_config(adapter: Path) -> AdapterConfig:
    """Read adapter_config.json.

    Raises ModelError if the adapter's kind cannot be merged, ArtifactError if the file is damaged.
    """
    path = adapter / "adapter_config.json"
    raw = json.loads(path.read_text())
    kinds = [kind for key, kind in REFUSED.items() if raw.get(key)]
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGING_INIT):
        kinds.append(f"init_lora_weights {start}, which starts from other weights than the base's")
    if raw.get("peft_type") != "LORA":
        kinds.append(f"peft_type {raw.get('peft_type')}")
    if kinds:
        raise ModelError(
            where=str(adapter),
            found=f"cannot be merged: {', '.join(kinds)}",
            expected=MERGEABLE,
            fix="train with one of these",
        )
    return read_document(path, AdapterConfig, "train the adapter again")


def _target(name: str) -> str | None:
    """Return the base's tensor that a tensor of the adapter updates, None if it only follows.

    Of A and B, A leads.
    """
    module = name.removeprefix(PREFIX)
    for ending in (".lora_A.weight", ".lora_embedding_A", ".token_adapter.trainable_tokens_delta"):
        if module.endswith(ending):
            return module.removesuffix(ending) + ".weight"
    if "lora_" in module or ".base_layer." in module or not name.startswith(PREFIX):
        return None
    return module


def _update(
    name: str, file: TensorFile, config: AdapterConfig
) -> tuple[str, Update, set[str]] | None:
    """Return the base's tensor, its update, and the adapter's tensors that the update reads."""
    target = _target(name)
    if target is None:
        return None
    module = target.removesuffix(".weight")
    entries = file.entries
    if name.endswith("trainable_tokens_delta"):
        update = Update("rows", lambda: _rows(entries[name], _token_ids(config, module)))
        return target, update, {name}
    if "lora_" not in name:
        return target, Update("replaced", lambda: _replace(entries[name])), {name}
    transposed = name.endswith("lora_embedding_A") or bool(config.fan_in_fan_out)
    partner = name.replace("lora_embedding_A", "lora_embedding_B")
    partner = partner.replace("lora_A.weight", "lora_B.weight")
    magnitude = f"{PREFIX}{module}.lora_magnitude_vector"
    if f"{magnitude}.weight" in entries:
        magnitude = f"{magnitude}.weight"
    _require_pair(f"{file.path}: {name}", partner, transposed and magnitude in entries, entries)
    scale = scaling(module, entries[name].shape[0], config)
    length = entries.get(magnitude)
    update = Update(
        "lora",
        lambda: _low_rank(entries[name], entries[partner], length, scale, transposed),
    )
    base_copy = f"{PREFIX}{module}.base_layer.weight"  # unchanged, so it is not read
    return target, update, {name, partner, base_copy, *([magnitude] if length else [])}


def _require_pair(where: str, partner: str, is_dora: bool, entries: Mapping[str, Entry]) -> None:
    """Raise ModelError if B is missing, or a transposed layer or an embedding has DoRA."""
    if partner not in entries:
        raise ModelError(
            where=where,
            found=f"there is no {partner}",
            expected="A and B of a layer",
            fix="the file is damaged: train it again",
        )
    if is_dora:
        raise ModelError(
            where=where,
            found="DoRA on an embedding or a transposed layer",
            expected="DoRA on linear layers only",
            fix="remove the module from lora.target_modules",
        )


def scaling(module: str, rank: int, config: AdapterConfig) -> float:
    """Compute s of W + s·BA for a module whose A has `rank` rows.

    The keys of alpha_pattern are matched as PEFT matches them.
    """
    patterns = (config.alpha_pattern or {}).items()
    matching = (alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(matching, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _token_ids(config: AdapterConfig, module: str) -> list[int]:
    given = config.trainable_token_indices or []
    if isinstance(given, list):
        return given
    return next(ids for key, ids in given.items() if module == key or module.endswith(f".{key}"))


def _low_rank(
    low: Entry, high: Entry, magnitude: Entry | None, scale: float, transposed: bool
) -> Apply:
    a = read_tensor(low).float()  # (r, in)
    b = read_tensor(high).float()  # (out, r)
    m = read_tensor(magnitude).float().reshape(-1, 1) if magnitude is not None else None

    def apply(rows: torch.Tensor, first: int) -> torch.Tensor:
        part = slice(first, first + rows.shape[0])
        delta = a[:, part].T @ b.T if transposed else b[part] @ a
        # Not addmm: PEFT rounds product, scale and sum each, and the bits must be the same.
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
