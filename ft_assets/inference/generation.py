"""Generate answers of one model to many prompts, greedily or sampled by a seeded rule.

Batches are sorted by length, and the shared prefix is computed once. Where a model's cache makes
one of the two inexact, the answers are generated without it. On a GPU, tokens are decoded by CUDA
graphs where that is proven on the model (fast.py), else by transformers' own loop. An answer that
cannot be generated is an error, never an empty text.
Not here: the scores of an answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from ft_assets.errors import EvaluationError
from ft_assets.inference.fast import Asked, Fast, decodes_fast, fits
from ft_assets.inference.padding import GREEDY, batch_is_exact, padded
from ft_assets.inference.prefix import (
    Prefix,
    is_attention,
    longest_padded,
    prefill,
    repeated,
    shared_prefix,
)
from ft_assets.inference.sampling import Sampled, Sampling

SLIDING = "the shared prefix is computed for each row: rows end beyond the sliding window"
RECURRENT = "the shared prefix is computed for each row: its state cannot be continued"
UNPADDED = "a batch has prompts of one length: padding changes this model's answers"
ALONE = "each prompt is answered alone: other rows of a batch change this model's answers"


@dataclass(frozen=True)
class Answer:
    """A generated text.

    `stopped`: it ended with a stop token before the limit. `tokens`: its length. `ids`: its tokens,
    with the stop token.
    """

    text: str
    stopped: bool
    tokens: int
    ids: tuple[int, ...]


def default_batch_size(model: Any, tokens: int) -> int:
    """Return the default number of rows of `tokens` (prompt and answer) in a batch.

    It is 32 on a CPU, where more gains little. On a GPU decoding is bound by reading the weights,
    so tokens/s grow with the rows: the keys and values of the rows fill half of the free memory, at
    most 512 rows.
    """
    if model.device.type != "cuda":
        return 32
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * tokens
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(512, int(free / 2 / row)))


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    stops: frozenset[int],
    max_new_tokens: int,
    batch_size: int | None = None,
    ids: list[str] | None = None,
    told: Callable[[str], object] = lambda _: None,
    sampling: Sampling | None = None,
) -> list[Answer]:
    """Return the answers to `prompts` (token ids), in their order: greedy without `sampling`.

    `told` gets a sentence for each shortcut that this model's cache does not allow. A batch that
    does not fit into memory is halved. Raises EvaluationError with the row (its entry of `ids`,
    else its number) whose generation fails: a row without an answer is never scored.
    """
    model.eval()
    longest = max(map(len, prompts)) + max_new_tokens
    pad = tokenizer.pad_token_id
    prefix = _usable_prefix(model, prompts, longest, told)
    one = prefix.cache
    if one is None and (len(prompts) > 1 or decodes_fast(model)):
        one = prefill(model, min(prompts, key=len)[:1])
    padded, most = _exact_batches(model, prompts, one, pad, told)
    size = min(most, batch_size or default_batch_size(model, longest))
    batches = list(_batches([len(prompt) for prompt in prompts], size, padded))
    asked = Asked(model, stops, pad, longest, max_new_tokens, sampling)
    steps = len(batches) * max_new_tokens
    fast = Fast(asked, one, told) if fits(asked, one, prompts, prefix, steps, told) else None

    def answer(batch: list[int]) -> list[Answer]:
        chosen = [prompts[index] for index in batch]
        sampled = sampling.of(batch, max_new_tokens) if sampling else None
        tokens = fast.answers(chosen, prefix, sampled) if fast else None
        if tokens is None:
            tokens = _by_transformers(asked, chosen, prefix, sampled)
        return [_answer(tokenizer, row, stops) for row in tokens]

    answers: dict[int, Answer] = {}
    for batch in batches:
        answers.update(zip(batch, _carefully(answer, batch, ids), strict=True))
    return [answers[index] for index in range(len(prompts))]


def _usable_prefix(
    model: Any, prompts: list[list[int]], longest: int, told: Callable[[str], object]
) -> Prefix:
    """Return the shared prefix and its cache, or an empty one if rows cannot continue it exactly.

    longest: the tokens of the longest prompt with its answer.
    """
    prefix = shared_prefix(prompts)
    if not prefix:
        return Prefix(0, None)
    cache = prefill(model, prefix)
    if longest <= longest_padded(cache):
        return Prefix(len(prefix), cache)
    told(SLIDING if is_attention(cache) else RECURRENT)
    return Prefix(0, None)


def _exact_batches(
    model: Any, prompts: list[list[int]], one: Any, pad: int, told: Callable[[str], object]
) -> tuple[bool, int]:
    """Return (padding keeps the answers, the largest batch that keeps them).

    one: a cache of the model. Masks of keys and values are exact. What recurrent layers make of a
    batch is measured.
    """
    short, long = min(prompts, key=len), max(prompts, key=len)
    if len(prompts) == 1 or is_attention(one):
        return True, len(prompts)
    if batch_is_exact(model, short, long, pad):
        return True, len(prompts)
    if batch_is_exact(model, short, short[::-1], pad):  # other tokens, as many
        told(UNPADDED)
        return False, len(prompts)
    told(ALONE)
    return False, 1


def _batches(lengths: list[int], size: int, padded: bool) -> Iterator[list[int]]:
    """Yield the row numbers of each batch, the shortest first; of one length unless `padded`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) == size or not (padded or lengths[index] == lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _carefully(
    answer: Callable[[list[int]], list[Answer]], batch: list[int], ids: list[str] | None
) -> list[Answer]:
    """Return the answers of a batch. On a failure halve it, down to the row that fails."""
    try:
        return answer(batch)
    except Exception as error:  # torch, CUDA and the model's own code raise anything
        if len(batch) == 1:
            row = ids[batch[0]] if ids else f"number {batch[0]}"
            message = str(error).splitlines()[0][:200] if str(error) else ""
            raise EvaluationError(
                where=f"row {row}",
                found=f"its answer cannot be generated ({type(error).__name__}: {message})",
                expected="an answer to every row: a row without an answer is never scored",
                fix="lower evaluation.max_new_tokens or batch_size if memory ran out, "
                "or correct the row",
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    return [*_carefully(answer, batch[:half], ids), *_carefully(answer, batch[half:], ids)]


def _by_transformers(
    asked: Asked, prompts: list[list[int]], prefix: Prefix, sampled: Sampled | None
) -> list[list[int]]:
    """Return the tokens of each answer, with those behind a stop token."""
    # Padding is between the prefix and the rest: the cached prefix keeps its positions.
    inputs = padded(asked.model, prompts, asked.pad, prefix.length)
    kwargs: dict[str, Any] = {}
    if sampled is not None:
        kwargs["logits_processor"] = LogitsProcessorList([sampled])
    if prefix.length:
        kwargs["past_key_values"] = repeated(prefix.cache, len(prompts))
    output = asked.model.generate(
        **inputs,
        **GREEDY,
        max_new_tokens=asked.new,
        eos_token_id=sorted(asked.stops),
        pad_token_id=asked.pad,
        **kwargs,
    )
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _answer(tokenizer: Any, row: list[int], stops: frozenset[int]) -> Answer:
    end = next((position for position, token in enumerate(row) if token in stops), None)
    tokens = row if end is None else row[:end]
    return Answer(
        tokenizer.decode(tokens, skip_special_tokens=True),
        end is not None,
        len(tokens),
        ids=tuple(row[: len(tokens) + 1]),
    )
