"""Load a snapshot: the tokenizer alone (no torch), or the weights in this machine's best dtype."""

import json
import os
from pathlib import Path
from typing import Any

from ft_assets.config.training import ALL_LINEAR, TARGETS
from ft_assets.errors import TrainingError
from ft_assets.hardware import compute_dtype


def load_tokenizer(snapshot: Path) -> Any:
    """Return the tokenizer of a snapshot."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(snapshot, local_files_only=True)


def stop_ids(snapshot: Path) -> frozenset[int]:
    """Return the tokens at which the model's generation stops."""
    eos = json.loads((snapshot / "generation_config.json").read_text())["eos_token_id"]
    return frozenset(eos if isinstance(eos, list) else [eos])


def context_length(snapshot: Path) -> int | None:
    """Return the model's context in tokens, or None if its config does not have it."""
    config = json.loads((snapshot / "config.json").read_text())
    return config.get("max_position_embeddings") or config.get("text_config", {}).get(
        "max_position_embeddings"
    )


def load_base(
    snapshot: Path, quantized: bool = False, dtype: Any = None, on_cpu: bool = False
) -> Any:
    """Load the base model, on the GPU if one is available and `on_cpu` is false.

    Its attention is transformers' default: torch's kernels, or plain operations for a class that
    they do not fit (soft-capped scores, attention sinks).
    The weights are in `dtype`, by default the compute dtype; NF4 with double quantization if
    `quantized`.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers import logging as hf_logging

    hf_logging.disable_progress_bar()
    kwargs: dict[str, Any] = {
        "dtype": dtype or compute_dtype(),
        "local_files_only": True,
    }
    if torch.cuda.is_available() and not on_cpu:
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    if quantized:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(),
        )
    return AutoModelForCausalLM.from_pretrained(snapshot, **kwargs)


def target_modules(model: Any, targets: str | list[str]) -> list[str] | str:
    """Return the module names of a preset or a list.

    Raises TrainingError with the names of the model's linear layers if one is missing.
    """
    if targets == ALL_LINEAR:
        return targets
    wanted = list(TARGETS[targets]) if isinstance(targets, str) else targets
    import torch

    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    missing = [name for name in wanted if name not in linear]
    if missing:
        raise TrainingError(
            where="lora.target_modules",
            found=f"the model has no linear layer {', '.join(missing)}",
            expected=f"some of {', '.join(sorted(linear))}",
            fix="name them in lora.target_modules, or use all-linear",
        )
    return wanted
