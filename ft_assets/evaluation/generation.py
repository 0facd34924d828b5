"""Greedy answers of one model to many prompts, in length-sorted batches, with the shared prefix computed once.

Not here: what an answer is worth. An answer that cannot be generated is an error, never an empty text.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

MIN_PREFIX = 16


@dataclass(frozen=True)
class Answer:
    """A generated text, whether it ended by itself (a stop token before the cap), and its length in tokens."""

    text: str
    stopped: bool
    tokens: int


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], stops: frozenset[int], max_new_tokens: int, batch_size: int
) -> list[Answer]:
    """Return the greedy answers to `prompts` (token ids), in their order."""
    model.eval()
    prefix = _prefix(prompts)
    cache = _prefill(model, prefix) if prefix else None
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        rows = _generate_batch(model, tokenizer, [prompts[index] for index in batch], prefix, cache, stops, max_new_tokens)
        answers.update(zip(batch, rows, strict=True))
    return [answers[index] for index in range(len(prompts))]


def _prefix(prompts: list[list[int]]) -> list[int]:
    """Return the tokens that all prompts begin with (at least one is left to each), or [] if too few to pay."""
    shortest, first = min(len(prompt) for prompt in prompts), prompts[0]
    length = 0
    while length < shortest - 1 and all(prompt[length] == first[length] for prompt in prompts):
        length += 1
    return first[:length] if length >= MIN_PREFIX and len(prompts) > 1 else []


def _prefill(model: Any, prefix: list[int]) -> Any:
    ids = torch.tensor([prefix], device=model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1).past_key_values


def _generate_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], prefix: list[int], cache: Any, stops: frozenset[int], max_new_tokens: int
) -> list[Answer]:
    # Padding goes between the prefix and the rest, so that the cached prefix lies where it was computed.
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = [[*prefix, *[pad] * (width - len(prompt)), *prompt[len(prefix) :]] for prompt in prompts]
    mask = [[1] * len(prefix) + [0] * (width - len(prompt)) + [1] * (len(prompt) - len(prefix)) for prompt in prompts]
    kwargs: dict[str, Any] = {}
    if cache is not None:
        kwargs["past_key_values"] = copy.deepcopy(cache)
        kwargs["past_key_values"].batch_repeat_interleave(len(prompts))
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
        **kwargs,
    )
    answers = []
    for row in output[:, width:].tolist():
        end = next((position for position, token in enumerate(row) if token in stops), None)
        tokens = row if end is None else row[:end]
        answers.append(Answer(tokenizer.decode(tokens, skip_special_tokens=True), end is not None, len(tokens)))
    return answers


@torch.inference_mode()
def answer_losses(model: Any, rows: list[dict[str, Any]], batch_size: int, pad: int) -> list[float]:
    """Return, for each tokenized row, the mean cross-entropy of its supervised tokens in nats a token."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    losses: dict[int, float] = {}
    for begin in range(0, len(order), batch_size):
        batch = [rows[index] for index in order[begin : begin + batch_size]]
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in batch], device=model.device)
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch], device=model.device)
        keep = torch.tensor([row["supervised"] + [False] * (width - len(row["supervised"])) for row in batch], device=model.device)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        means = (loss * keep).sum(1) / keep.sum(1)
        losses.update(zip(order[begin : begin + batch_size], means.tolist(), strict=True))
    return [losses[index] for index in range(len(rows))]
