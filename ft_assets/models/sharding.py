"""The frozen base divided among the ranks (FSDP2): each holds a part of every layer, and gathers a layer when it computes it.

Only the decoder's layers are divided. The adapter, the embeddings and the head are whole on every rank, so that what is
trained is an ordinary tensor: DDP averages its gradients, and optimizer, clipping, checkpoints and the published adapter are
those of any other training. Not here: when it is done (plan.py).
"""

import os
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ft_assets.compat.accelerate import allow_sharded_weights_in_ddp
from ft_assets.compat.torch import ignore_in_ddp


def shard_base(model: Any, ranks: int) -> None:
    """Divide the frozen weights of a PeftModel's decoder layers over the ranks, in place, and bring the rest to the device.

    The model lies on the CPU, the same on each rank: a GPU never holds more than one whole layer besides its part. Every rank
    must make the same forward passes from here on: each of them gathers weights from all others.
    """
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (ranks,))
    decoder = model.get_base_model().get_decoder()
    whole = {weight for weight in model.parameters() if weight.requires_grad}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # The decoder has no part of its own: it is what lets a layer be gathered while the one before it computes.
    outside = {
        weight for name, weight in decoder.named_parameters() if not name.startswith("layers.")
    }
    fully_shard(decoder, mesh=mesh, ignored_params=whole | outside)
    _place_rest(model, device)
    # DDP averages gradients and copies the first rank's numbers: of what is trained only.
    frozen = (name for name, weight in model.named_parameters() if not weight.requires_grad)
    ignore_in_ddp(model, frozen)
    allow_sharded_weights_in_ddp()


def _place_rest(model: Any, device: torch.device) -> None:
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if not isinstance(weight, DTensor):
                weight.data = weight.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def is_sharded(model: Any) -> bool:
    """Return whether a model's base is divided among ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def held_weights(model: Any) -> dict[str, float]:
    """Return, for the metrics, what the weights take on this rank in GB where the base is divided; else nothing."""
    if not is_sharded(model):
        return {}
    held = (
        weight.to_local() if isinstance(weight, DTensor) else weight
        for weight in model.parameters()
    )
    return {
        "held_weights_gb": round(sum(part.numel() * part.element_size() for part in held) / 1e9, 6)
    }
