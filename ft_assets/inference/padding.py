"""Pad prompts to a batch, and measure whether that changes what a model answers."""

from collections.abc import Sequence
from typing import Any

import torch

# The arguments of greedy decoding, whatever the model's own generation settings are.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
}
STEPS = 4  # generated tokens: a state that padding has changed shows in the first or second
# Largest difference of logits, in standard deviations of the logits. Where padding is exact, it is
# below 1e-5 in fp32 and up to some hundredths in bf16; where it is not, it is 0.3 to 2.
MAX_DIFFERENCE = {torch.float32: 1e-3}
MAX_ROUNDED = 0.1


def batch_is_exact(model: Any, prompt: list[int], other: list[int], pad: int) -> bool:
    """Return True if a prompt is answered the same alone and beside another prompt.

    Beside a longer prompt it is padded. The logits of the first generated tokens are compared, as
    long as the tokens are equal.
    """
    alone = _logits(model, [prompt], pad)
    beside = _logits(model, [prompt, other], pad)
    largest = MAX_DIFFERENCE.get(model.dtype, MAX_ROUNDED)
    for one, two in zip(alone, beside, strict=False):
        if float((one - two).abs().max() / one.std()) > largest:
            return False
        if one.argmax() != two.argmax():  # a tie: later logits are of other tokens
            break
    return True


def padded(
    model: Any, prompts: Sequence[Sequence[int]], pad: int, prefix: int = 0
) -> dict[str, torch.Tensor]:
    """Return the token ids and the mask of prompts, with padding after their first `prefix` tokens.

    Both are (prompts, tokens of the longest), on the model's device.
    """
    width = max(map(len, prompts))
    empty = [width - len(prompt) for prompt in prompts]
    ids = [
        [*prompt[:prefix], *[pad] * gap, *prompt[prefix:]]
        for prompt, gap in zip(prompts, empty, strict=True)
    ]
    mask = [[1] * prefix + [0] * gap + [1] * (width - prefix - gap) for gap in empty]
    return {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }


def _logits(model: Any, prompts: list[list[int]], pad: int) -> list[torch.Tensor]:
    """Return the fp32 logits (vocabulary,) of each generated token of the first prompt."""
    output = model.generate(
        **padded(model, prompts, pad),
        **GREEDY,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [step[0].float() for step in output.logits]
