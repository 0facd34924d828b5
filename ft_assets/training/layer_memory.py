"""Measure what each layer of a loaded model keeps for its backward pass, for the memory plan.

The plan before the weights load is a formula over the shape. It does not know every kernel: the
scan of an SSM in plain torch, say, keeps several times as much as its Triton kernel. Here a few
tokens pass through the prepared model, one layer's activations at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ft_assets.models.decoder import decoder_of, layers_of
from ft_assets.rows.types import TokenSequence
from ft_assets.training.linears import linear_groups
from ft_assets.training.memory_plan.estimate import Kept

FEW, MORE = 128, 384  # tokens; the difference leaves out what does not grow with them


def measure_layers(
    model: Any, rows: Sequence[TokenSequence], collator: Any, autocast: bool
) -> Kept | None:
    """Return the bytes per token that the layers of a model on a GPU keep; None if memory runs out.

    collator: of the training's micro-batches, which says whether rows are packed.
    """
    tokens = [token for row in rows[:MORE] for token in row["input_ids"]]
    tokens = (tokens * -(-MORE // len(tokens)))[:MORE]
    try:
        _pass(model, tokens, collator, autocast)  # what is made once, at first use
        more, few = (_pass(model, tokens[:count], collator, autocast) for count in (MORE, FEW))
    except torch.OutOfMemoryError:
        return None
    finally:
        for group in linear_groups(model):
            group.forget()
    kept = [(one - two) / (MORE - FEW) for one, two in zip(more, few, strict=True)]
    return Kept(sum(kept) / len(kept), max(kept)) if kept and min(kept) >= 0 else None


def _allocated() -> int:
    return torch.cuda.memory_allocated()


def _pass(model: Any, tokens: list[int], collator: Any, autocast: bool) -> list[int]:
    """Return the bytes that each layer keeps for these tokens, as two documents of equal length."""
    half = len(tokens) // 2
    batch = collator([{"input_ids": ids, "labels": ids} for ids in (tokens[:half], tokens[half:])])
    device = next(model.parameters()).device
    batch = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    begun: list[int] = []
    kept: list[int] = []

    def enter(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:  # not a leaf, which a layer must not add to in place
            arguments = (arguments[0].detach().requires_grad_(True).clone(), *arguments[1:])
        begun.append(_allocated())
        return arguments, keywords

    def leave(_: Any, __: Any, output: Any) -> Any:
        kept.append(_allocated() - begun[-1])
        # The next layer's input has no history, so that this layer's activations are freed.
        if isinstance(output, torch.Tensor):
            return output.detach()
        return (output[0].detach(), *output[1:])

    layers = list(layers_of(model))
    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    was_training = model.training
    model.train()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            decoder_of(model)(**batch, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return kept
