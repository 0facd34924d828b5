"""What NF4 with double quantization makes of a base's weights: the weights that a QLoRA adapter was trained against.

Tensor by tensor, by bitsandbytes' own functions; not by a model loaded in 4 bits, whose weights a CPU's first forward
pass repacks for good (bitsandbytes 0.50 with AVX512-BF16).
"""

from pathlib import Path
from typing import Any

import torch


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight after NF4 quantization and back, in its own dtype (Dettmers et al. 2023, section 3)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = torch.device("cuda") if torch.cuda.is_available() else weight.device
    packed, state = quantize_4bit(
        weight.to(device).contiguous(), compress_statistics=True, quant_type="nf4"
    )
    return dequantize_4bit(packed, state).to(weight.device, weight.dtype).reshape(weight.shape)


def quantized_tensors(snapshot: Path) -> frozenset[str]:
    """Return the names of the weights that loading this snapshot in NF4 quantizes: all linear layers but the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(snapshot, local_files_only=True)
        )
    return frozenset(f"{name}.weight" for name, _ in quantized_linears(model))


def quantized_linears(model: Any) -> list[tuple[str, Any]]:
    """Return (name, module) of the linear layers that transformers quantizes in this model."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and should_convert_module(name, kept)
    ]


@torch.no_grad()
def simulate(model: Any) -> None:
    """Replace the weights of a loaded base by what NF4 makes of them, in place."""
    for _, module in quantized_linears(model):
        weight = module.weight.data
        module.weight.data = round_trip(weight.to(torch.bfloat16)).to(weight.dtype)
