"""Render a conversation with the model's own template, find what is supervised, and prove it.

The mask needs no markers in the template: each assistant turn is found by rendering the conversation up to it, with
and without the answer. What is proven for every row:
  1. the tokens before a supervised span equal what the model is given at generation
     (`apply_chat_template(messages[:k], add_generation_prompt=True)`);
  2. the span decodes to the answer, then the end of the turn, and nothing of another turn;
  3. there is at most one BOS, at the start;
  4. the span ends with a token at which generation stops.
Not here: where the template comes from (models/), truncation and splitting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[dict[str, str]]


class ProofFailed(Exception):
    """A row whose rendering cannot be proven; the message says which proof and where."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of one conversation and, for each, whether it is supervised."""

    input_ids: list[int]
    supervised: list[bool]


def render(tokenizer: Any, messages: Messages, generation_prompt: bool = False) -> list[int]:
    """Return the token ids of the model's own template. Raises ProofFailed with the template's own reason."""
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=generation_prompt, tokenize=True, return_dict=False)
    except Exception as error:  # jinja raises its own classes, templates raise through raise_exception
        raise ProofFailed(f"the template refuses the conversation: {error}") from error


def render_supervised(tokenizer: Any, messages: Messages, stop_ids: frozenset[int]) -> Rendered:
    """Return a conversation with the assistant's turns supervised, proven. Raises ProofFailed.

    `stop_ids` are the tokens at which the model's generation stops.
    """
    whole = render(tokenizer, messages)
    supervised = [False] * len(whole)
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            begin, end = _answer_span(tokenizer, messages, index, whole, stop_ids)
            supervised[begin:end] = [True] * (end - begin)
    prove_single_bos(tokenizer, whole)
    return Rendered(whole, supervised)


def _answer_span(tokenizer: Any, messages: Messages, index: int, whole: list[int], stop_ids: frozenset[int]) -> tuple[int, int]:
    """Return where the answer `messages[index]` and its end of turn stand in `whole`, proven. Raises ProofFailed."""
    context = render(tokenizer, messages[:index], generation_prompt=True)
    upto = whole if index == len(messages) - 1 else render(tokenizer, messages[: index + 1])
    if whole[: len(context)] != context:
        raise ProofFailed(f"messages[{index}]: the tokens before the answer differ from those given at generation")
    if whole[: len(upto)] != upto:
        raise ProofFailed(f"messages[{index}]: the template rewrites this turn once later turns follow")
    end = _end_of_turn(whole, len(context), len(upto), stop_ids)
    if end is None:
        raise ProofFailed(f"messages[{index}]: no token that ends generation follows the answer (looked for {sorted(stop_ids)})")
    answer = tokenizer.decode(whole[len(context) : end], skip_special_tokens=False)
    if answer.strip() != messages[index]["content"].strip():
        raise ProofFailed(f"messages[{index}]: the supervised tokens decode to {answer[:80]!r}, not to the answer")
    return len(context), end + 1


def _end_of_turn(ids: Sequence[int], start: int, stop: int, stop_ids: frozenset[int]) -> int | None:
    return next((position for position in range(start, stop) if ids[position] in stop_ids), None)


def prove_single_bos(tokenizer: Any, ids: Sequence[int]) -> None:
    """Raise ProofFailed if BOS stands anywhere but once at the start (models whose BOS also opens turns are exempt)."""
    bos = tokenizer.bos_token_id
    if bos is None or bos not in ids:
        return
    template = tokenizer.chat_template or ""
    opens_turns = tokenizer.bos_token in template and "bos_token" not in template
    if ids.count(bos) > 1 and not opens_turns:
        raise ProofFailed(f"BOS stands {list(ids).count(bos)} times; expected once, at the start")


def render_answer(tokenizer: Any, messages: Messages, answer: str, stop_ids: frozenset[int]) -> tuple[list[int], list[int]]:
    """Return (prompt ids, answer ids with its end of turn), proven; earlier answers are prompt. Raises ProofFailed."""
    asked = [*messages, {"role": "assistant", "content": answer}]
    whole = render(tokenizer, asked)
    begin, end = _answer_span(tokenizer, asked, len(messages), whole, stop_ids)
    prove_single_bos(tokenizer, whole)
    return whole[:begin], whole[begin:end]
