"""Merge a LoRA adapter into its base, tensor by tensor from disk: W + s·BA in fp32, rounded once to the base's dtype.

`s` is lora_alpha / r, or lora_alpha / √r with rsLoRA. Never the whole model in memory, and never into a 4-bit base: the
update is smaller than an NF4 step and would be rounded away. Adapters with more than A and B (DoRA, modules_to_save,
trained tokens) are merged by PEFT instead.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ft_assets.errors import ModelError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def merge(snapshot: Path, adapter: Path, output: Path) -> dict[str, Any]:
    """Write the merged model to `output` and return {"merged_modules", "bytes", "method"}. Raises ModelError."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    for path in snapshot.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("manifest.json", "facts.json"):
            shutil.copy2(path, output / path.name)
    plain = not (config.get("use_dora") or config.get("modules_to_save") or config.get("trainable_token_indices"))
    if not plain:
        return _merge_by_peft(snapshot, adapter, output)
    updates = _read_updates(adapter, config)
    done: set[str] = set()
    for shard in sorted(snapshot.glob("*.safetensors")):
        _merge_shard(shard, output / shard.name, updates, done)
    missing = sorted(set(updates) - done)
    if missing:
        raise ModelError(
            str(adapter),
            f"{len(missing)} modules have no weight in the base, e.g. {missing[0]}",
            f"an adapter of {snapshot}",
            "merge it into the base it was trained on",
        )
    return {"merged_modules": len(done), "bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")), "method": "streaming"}


def _read_updates(adapter: Path, config: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    rank, alpha = config["r"], config["lora_alpha"]
    updates: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
        for name in names:
            if not name.endswith("lora_A.weight"):
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            low, high = file.get_tensor(name), file.get_tensor(name.replace("lora_A", "lora_B"))
            pattern_rank = next((value for key, value in (config.get("rank_pattern") or {}).items() if module.endswith(key)), rank)
            scale = alpha / math.sqrt(pattern_rank) if config.get("use_rslora") else alpha / pattern_rank
            updates[f"{module}.weight"] = (low, high, scale)
    if 2 * len(updates) != len(names):
        raise ModelError(
            str(adapter),
            f"holds {len(names)} tensors, {2 * len(updates)} of them A and B",
            "only A and B",
            "report it: this kind of adapter is not merged by streaming",
        )
    return updates


def _merge_shard(source: Path, target: Path, updates: dict[str, tuple[torch.Tensor, torch.Tensor, float]], done: set[str]) -> None:
    tensors = {}
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            weight = file.get_tensor(name)
            if name in updates:
                low, high, scale = updates[name]
                weight = torch.addmm(weight.float(), high.float(), low.float(), alpha=scale).to(weight.dtype)
                if not torch.isfinite(weight).all():
                    raise ModelError(
                        f"{source.name}: {name}", "the merged weight is not finite", "finite weights", "train the adapter again"
                    )
                done.add(name)
            tensors[name] = weight
    save_file(tensors, target, metadata=metadata)


def _merge_by_peft(snapshot: Path, adapter: Path, output: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.bfloat16, local_files_only=True)
    model = PeftModel.from_pretrained(base, str(adapter))
    modules = sum("lora_A" in name and name.endswith("default") for name, _ in model.named_modules())
    model.merge_and_unload(safe_merge=True).save_pretrained(output)
    return {"merged_modules": modules, "bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")), "method": "peft"}
