"""Reuse the tokens that all prompts begin with, where a cache allows it.

A batch continues one row's cache, with its padding between the prefix and the rest of each prompt.
Full attention masks that padding. A sliding window counts it as tokens, so the rows must end inside
the window. A recurrent state (linear attention, SSM, convolution) has read the prefix of one row
only and takes part in every later token: it is not continued.
"""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

MIN_PREFIX = 16
ANY_LENGTH = sys.maxsize
# Classes by their names: DummyLayer is not in the oldest transformers that is supported.
ATTENTION = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


@dataclass(frozen=True)
class Prefix:
    """The number of tokens that all prompts begin with, and their cache for one row.

    It is empty (0, None) where rows do not continue one cache.
    """

    length: int
    cache: Any


def shared_prefix(prompts: list[list[int]]) -> list[int]:
    """Return the tokens that all prompts begin with, or [] if they are too few to pay.

    Each prompt keeps at least one token of its own.
    """
    if len(prompts) < 2:
        return []
    shortest, first = min(len(prompt) for prompt in prompts), prompts[0]
    length = 0
    while length < shortest - 1 and all(prompt[length] == first[length] for prompt in prompts):
        length += 1
    return first[:length] if length >= MIN_PREFIX else []


def prefill(model: Any, prefix: list[int]) -> Any:
    """Return the cache of a prefix, for one row; None for a model that returns no cache."""
    ids = torch.tensor([prefix], device=model.device)
    outputs = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1
    )
    return getattr(outputs, "past_key_values", None)


def repeated(cache: Any, rows: int) -> Any:
    """Return a copy of one row's cache for a batch."""
    batch = copy.deepcopy(cache)
    batch.batch_repeat_interleave(rows)
    return batch


def is_attention(cache: Any) -> bool:
    """Return True for a cache that has only keys and values.

    A DummyLayer is of a layer without a cache, or with that of another layer.
    """
    return type(cache) is DynamicCache and all(
        type(layer).__name__ in ATTENTION for layer in cache.layers
    )


def longest_padded(cache: Any) -> int:
    """Return the tokens, padding included, up to which rows with padding may continue a cache.

    It is the smallest sliding window of the layers, ANY_LENGTH without one, and 0 for a cache that
    rows cannot continue.
    """
    if not is_attention(cache):
        return 0
    windows = [
        layer.sliding_window
        for layer in cache.layers
        if isinstance(layer, DynamicSlidingWindowLayer)
    ]
    return min(windows, default=ANY_LENGTH)
