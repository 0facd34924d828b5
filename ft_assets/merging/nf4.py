"""Round a base's weights to NF4 with double quantization, as a QLoRA adapter saw them in training.

The round trip is done tensor by tensor with bitsandbytes' own functions, not with a model loaded in
4 bits: the first forward pass on a CPU repacks the weights of such a model permanently
(bitsandbytes 0.50 with AVX512-BF16).
"""

from pathlib import Path
from typing import Any

import torch

from ft_assets.models.text_part import has_parts, stored_names, text_class


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    """Quantize a weight to NF4 and back, in its own dtype (Dettmers et al. 2023, section 3)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = torch.device("cuda") if torch.cuda.is_available() else weight.device
    packed, state = quantize_4bit(
        weight.to(device).contiguous(), compress_statistics=True, quant_type="nf4"
    )
    return dequantize_4bit(packed, state).to(weight.device, weight.dtype).reshape(weight.shape)


def quantized_tensors(snapshot: Path) -> frozenset[str]:
    """Return the names of the weights that NF4 quantizes: all linear layers but the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(snapshot, local_files_only=True)
    with torch.device("meta"):
        if has_parts(config):
            model = text_class(str(snapshot), config)(config.get_text_config(decoder=True))
        else:
            model = AutoModelForCausalLM.from_config(config)
    names = stored_names(snapshot)
    weights = (f"{name}.weight" for name, _ in quantized_linears(model))
    return frozenset(names.get(name, name) for name in weights)


def quantized_linears(model: Any) -> list[tuple[str, Any]]:
    """Return (name, module) of the linear layers that transformers quantizes."""
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
    """Replace the linear weights of a loaded base by their NF4 round trip, in place."""
    for _, module in quantized_linears(model):
        weight = module.weight.data
        module.weight.data = round_trip(weight.to(torch.bfloat16)).to(weight.dtype)
