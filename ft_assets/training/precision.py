"""When fp32 parameters meet a bf16 base outside of the trainer's own autocast."""

from typing import Any

import torch


def autocast_if_mixed(model: Any) -> Any:
    """Return a context that is bf16 autocast where parameters besides the adapter's are of several dtypes, else none.

    That is so with lora.modules_to_save and lora.trainable_token_indices on a bf16 base: what is trained is fp32. The
    adapter's own layers cast by themselves, and a model that is trained whole is fp32 throughout.
    """
    dtypes = {
        weight.dtype
        for name, weight in model.named_parameters()
        if "lora_" not in name and weight.is_floating_point()
    }
    return torch.autocast(
        next(model.parameters()).device.type, torch.bfloat16, enabled=len(dtypes) > 1
    )
