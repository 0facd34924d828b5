"""The frozen base sharded over the ranks (FSDP2).

Each rank holds a part of every layer and gathers a layer when it computes it. Only the decoder's
layers are sharded. The adapter, the embeddings and the head are whole on every rank, so what is
trained is an ordinary tensor: DDP averages its gradients, and optimizer, clipping, checkpoints and
the published adapter are those of any other training. Not here: the decision to shard
(training/memory_plan/plan.py).
"""

import os
from typing import Any, TypedDict

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ft_assets.compat.accelerate import allow_sharded_weights_in_ddp
from ft_assets.compat.torch import ignore_in_ddp
from ft_assets.models.decoder import decoder_of


class ShardMetrics(TypedDict, total=False):
    """The weights that this rank holds, in GB; absent if the base is not sharded."""

    held_weights_gb: float


def shard_base(model: Any, ranks: int) -> None:
    """Shard the frozen weights of a PeftModel's decoder layers over the ranks, in place.

    The other weights move to the device. The model starts on the CPU, the same on each rank, so a
    GPU never holds more than one whole layer besides its part. From here on every rank must make
    the same forward passes: each of them gathers weights from all others.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (ranks,))
    decoder = decoder_of(model)
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # The decoder itself holds no part. Sharding it lets a layer be gathered while the layer before
    # it computes.
    outside = {
        weight for name, weight in decoder.named_parameters() if not name.startswith("layers.")
    }
    fully_shard(decoder, mesh=mesh, ignored_params=trained | outside)
    _place_rest(model, device)
    # DDP averages gradients and broadcasts the first rank's values of trained parameters only.
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
    """Return True if a model's base is sharded over ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def held_weights(model: Any) -> ShardMetrics:
    """Return the size of the weights on this rank if the base is sharded; else nothing."""
    if not is_sharded(model):
        return {}
    held = (
        weight.to_local() if isinstance(weight, DTensor) else weight
        for weight in model.parameters()
    )
    bytes_held = sum(part.numel() * part.element_size() for part in held)
    return {"held_weights_gb": round(bytes_held / 1e9, 6)}
