"""Generate greedy answers of one model to many prompts.

Batches are sorted by length, and the shared prefix is computed once. An answer that cannot be
generated is an error, never an empty text.
Not here: the scores of an answer.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ft_assets.errors import EvaluationError

MIN_PREFIX = 16


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
) -> list[Answer]:
    """Return the greedy answers to `prompts` (token ids), in their order.

    A batch that does not fit into memory is halved. Raises EvaluationError with the row (its entry
    of `ids`, else its number) whose generation fails: a row without an answer is never scored.
    """
    model.eval()
    prefix = shared_prefix(prompts)
    cache = prefill(model, prefix) if prefix else None

    def answer(batch: list[int]) -> list[Answer]:
        return _generate_batch(
            model,
            tokenizer,
            [prompts[index] for index in batch],
            prefix,
            cache,
            stops,
            max_new_tokens,
        )

    size = batch_size or default_batch_size(model, max(map(len, prompts)) + max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        answers.update(zip(batch, _carefully(answer, batch, ids), strict=True))
    return [answers[index] for index in range(len(prompts))]


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
                where=f"held-out row {row}",
                found=f"its answer cannot be generated ({type(error).__name__}: {message})",
                expected="an answer to every row: a row without an answer is never scored",
                fix="lower evaluation.max_new_tokens or batch_size if memory ran out, "
                "or correct the row",
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    return [*_carefully(answer, batch[:half], ids), *_carefully(answer, batch[half:], ids)]


def shared_prefix(prompts: list[list[int]]) -> list[int]:
    """Return the tokens that all prompts begin with, or [] if they are too few to pay.

    Each prompt keeps at least one token of its own.
    """
    shortest, first = min(len(prompt) for prompt in prompts), prompts[0]
    length = 0
    while length < shortest - 1 and all(prompt[length] == first[length] for prompt in prompts):
        length += 1
    return first[:length] if length >= MIN_PREFIX and len(prompts) > 1 else []


def prefill(model: Any, prefix: list[int]) -> Any:
    """Return the keys and values of a prefix, for one row."""
    ids = torch.tensor([prefix], device=model.device)
    return model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1
    ).past_key_values


def repeated(cache: Any, rows: int) -> Any:
    """Return a copy of one row's keys and values for a batch."""
    batch = copy.deepcopy(cache)
    batch.batch_repeat_interleave(rows)
    return batch


def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    prefix: list[int],
    cache: Any,
    stops: frozenset[int],
    max_new_tokens: int,
) -> list[Answer]:
    # Padding is between the prefix and the rest: the cached prefix keeps its positions.
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = [[*prefix, *[pad] * (width - len(prompt)), *prompt[len(prefix) :]] for prompt in prompts]
    mask = [
        [1] * len(prefix) + [0] * (width - len(prompt)) + [1] * (len(prompt) - len(prefix))
        for prompt in prompts
    ]
    kwargs: dict[str, Any] = {}
    if cache is not None:
        kwargs["past_key_values"] = repeated(cache, len(prompts))
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
        answers.append(
            Answer(
                tokenizer.decode(tokens, skip_special_tokens=True),
                end is not None,
                len(tokens),
                ids=tuple(row[: len(tokens) + 1]),
            )
        )
    return answers
