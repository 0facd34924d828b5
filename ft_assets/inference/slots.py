"""Keep keys and values in tensors of a fixed size, so that every decoding step is the same work.

Each row has the same number of slots, and each step writes one slot of all rows. The mask hides the
slots that are padding, that are not yet written, or that are outside of a sliding window: a window
keeps all its slots, because a ring of them would need the position on the host.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """The keys and values (rows, heads, slots, size) of one layer.

    `place` (1,): the next slot, which all layers share. The owner of the cache advances it.
    """

    is_compileable = True  # transformers then asks nothing of the mask's content
    keys: Any
    values: Any

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor, sliding: bool
    ) -> None:
        super().__init__()
        self.keys, self.values, self.place = keys, values, place
        self.is_sliding = sliding  # which of the model's masks is that of this layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the tensors exist."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token of each row, and return all slots."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of slots and the first one."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """Return the next slot as a tensor, which a CUDA graph reads anew in each step."""
        return self.place[0]

    def get_max_length(self) -> int:
        """Return the number of slots."""
        return self.keys.shape[2]


def slot_cache(one: Any, rows: int, slots: int, place: torch.Tensor) -> Cache:
    """Return an empty cache of `rows` in the shape of `one` row's cache (see prefix.is_attention).

    The memory is set to 0: a masked slot is multiplied by 0, which a NaN would survive.
    """
    layers: list[Any] = []
    for layer in one.layers:
        if layer.keys is None:
            layers.append(layer)  # without keys of its own
            continue
        keys, values = (
            tensor.new_zeros(rows, tensor.shape[1], slots, tensor.shape[3])
            for tensor in (layer.keys, layer.values)
        )
        layers.append(SlotLayer(keys, values, place, getattr(layer, "is_sliding", False)))
    return Cache(layers=layers)


def first_rows(cache: Cache, rows: int) -> Cache:
    """Return a cache that shares the memory of the first `rows`."""
    return Cache(
        layers=[
            SlotLayer(layer.keys[:rows], layer.values[:rows], layer.place, layer.is_sliding)
            if isinstance(layer, SlotLayer)
            else layer
            for layer in cache.layers
        ]
    )


def slot_layers(cache: Cache) -> list[SlotLayer]:
    """Return the layers that have slots."""
    return [layer for layer in cache.layers if isinstance(layer, SlotLayer)]
