"""Load a snapshot: the tokenizer alone (no torch), or the weights in this machine's best dtype."""

import json
import os
from pathlib import Path
from typing import Any

from ft_assets.config.training import ALL_LINEAR, TARGETS
from ft_assets.errors import TrainingError
from ft_assets.hardware import compute_dtype
from ft_assets.models.config_keys import size, text_config
from ft_assets.models.decoder import with_base_model
from ft_assets.models.text_part import has_parts, text_part, whole_class

# PEFT reads these names as parts of the experts' tensors.
EXPERT_LAYERS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


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
    return size(text_config(config), "max_position_embeddings")


def load_base(
    snapshot: Path, quantized: bool = False, dtype: Any = None, on_cpu: bool = False
) -> Any:
    """Load the base model, on the GPU if one is available and `on_cpu` is false.

    Of a model that also sees or hears it is the text part. Its attention is transformers' default:
    torch's kernels, or plain operations for a class that they do not fit (soft-capped scores,
    attention sinks).
    The weights are in `dtype`, by default the compute dtype; NF4 with double quantization if
    `quantized`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
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
    config = AutoConfig.from_pretrained(snapshot, local_files_only=True)
    if has_parts(config):
        where = str(snapshot)
        whole = whole_class(where, config).from_pretrained(snapshot, **kwargs)
        return with_base_model(text_part(where, whole))
    return with_base_model(AutoModelForCausalLM.from_pretrained(snapshot, **kwargs))


def target_modules(model: Any, targets: str | list[str]) -> list[str] | str:
    """Return the module names of a preset or a list.

    all-linear leaves out the experts of a mixture, and layers with the names of experts' layers.
    Raises TrainingError for these names, and with the names of the model's linear layers if one is
    missing.
    """
    import torch

    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    fused = has_fused_experts(model)
    if targets == ALL_LINEAR:
        return sorted(linear - EXPERT_LAYERS - {"lm_head"}) if fused else targets
    wanted = list(TARGETS[targets]) if isinstance(targets, str) else targets
    if fused and (experts := sorted(EXPERT_LAYERS & set(wanted))):
        raise TrainingError(
            where="lora.target_modules",
            found=f"{', '.join(experts)}: the experts of this mixture are one tensor for all",
            expected="linear layers, which the merge finds in the files",
            fix="use lora.target_modules: attention, or all-linear, which leaves the experts out",
        )
    missing = [name for name in wanted if name not in linear]
    if missing:
        raise TrainingError(
            where="lora.target_modules",
            found=f"the model has no linear layer {', '.join(missing)}",
            expected=f"some of {', '.join(sorted(linear))}",
            fix="name them in lora.target_modules, or use all-linear",
        )
    return wanted


def unadaptable_linears(model: Any) -> list[str]:
    """Return the names of linear layers that no adapter can be put around.

    A subclass of a linear layer, such as a router, returns more than a product. The kernels of
    Mamba read the weight of `out_proj` without calling the layer.
    """
    import torch

    modules = dict(model.named_modules())
    routers = [
        name
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear)
        and type(module) is not torch.nn.Linear
        and type(module).__module__.startswith("transformers.models.")
    ]
    mixers = [name for name, module in modules.items() if hasattr(module, "A_log")]
    return routers + [f"{name}.out_proj" for name in mixers if hasattr(modules[name], "D")]


def has_fused_experts(model: Any) -> bool:
    """Return True for a mixture whose layers have one tensor for all experts."""
    return any(
        ".experts." in name and parameter.dim() == 3 for name, parameter in model.named_parameters()
    )
