"""Measure whether the rows of a batch, or padding, change what a model answers."""

from typing import Any

import torch

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


def _logits(model: Any, prompts: list[list[int]], pad: int) -> list[torch.Tensor]:
    """Return the fp32 logits (vocabulary,) of each generated token of the first prompt."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[pad] * empty + prompt for empty, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * empty + [1] * (width - empty) for empty in padding]
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [step[0].float() for step in output.logits]
