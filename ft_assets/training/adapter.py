"""Put a LoRA adapter on a base, save it, and read what was trained."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ft_assets.config import LoraSettings
from ft_assets.models.loading import load_base, target_modules

TRAINED_GROUPS = "trained_groups.json"


def new_adapter(snapshot: Path, settings: LoraSettings) -> Any:
    """Return the base with a fresh adapter: A random, B zero, so that it starts as the base (Hu et al. 2021, 4.1)."""
    base = load_base(snapshot, quantized=settings.method == "qlora")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=settings.lora_dropout,
        target_modules=target_modules(base, settings.target_modules),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def trained_adapter(snapshot: Path, settings: LoraSettings, adapter: Path) -> Any:
    """Return the base with a trained adapter that goes on training, named `default` as TRL needs it."""
    base = load_base(snapshot, quantized=settings.method == "qlora")
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)


def save_adapter(model: Any, output: Path) -> None:
    """Save the adapter `default` alone (DPO's frozen reference is a copy of the SFT adapter and is not saved)."""
    model.peft_config["default"].base_model_name_or_path = None  # a path of this machine would be no identity
    model.save_pretrained(str(output), selected_adapters=["default"])
    (output / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours stands on the merged model


def save_groups(rows: Iterable[dict[str, Any]], output: Path, before: Path | None = None) -> None:
    """Write the groups of the rows an adapter was trained on (also those of the adapter it started from): the
    evaluation refuses to judge it on any of them."""
    groups = {row["group"] for row in rows} | (set(json.loads((before / TRAINED_GROUPS).read_text())) if before else set())
    (output / TRAINED_GROUPS).write_text(json.dumps(sorted(groups), indent=0))


def trainable_share(model: Any) -> dict[str, float]:
    """Return the number of trained parameters and their share in percent."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"trainable_parameters": trained, "trainable_percent": round(100 * trained / total, 4)}


def largest_update(model: Any) -> float:
    """Return the largest |B| over all targets: zero means that nothing was learnt."""
    return max(
        (float(parameter.detach().abs().max()) for name, parameter in model.named_parameters() if "lora_B.default" in name), default=0.0
    )


def is_finite(model: Any) -> bool:
    """Return whether all trained parameters are finite."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters() if parameter.requires_grad)
