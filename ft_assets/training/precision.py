"""Autocast where fp32 parameters meet a bf16 base outside of the trainer's own autocast."""

from contextlib import AbstractContextManager
from typing import Any

import torch


def autocast_if_mixed(model: Any) -> AbstractContextManager[Any]:
    """Return bf16 autocast, enabled if parameters besides the adapter's differ in dtype.

    They differ with lora.modules_to_save and lora.trainable_token_indices on a bf16 base, because
    trained parameters are fp32. The adapter's own layers cast by themselves. A model whose weights
    are all trained is fp32 throughout.
    """
    dtypes = {
        weight.dtype
        for name, weight in model.named_parameters()
        if "lora_" not in name and weight.is_floating_point() and weight.itemsize > 1  # not FP8
    }
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=len(dtypes) > 1)
