"""Put an answer behind the text that the model is given at generation.

Some templates write a turn differently once its answer follows: they take out the empty thinking
that the generation prompt writes (Gemma 4, Command R7B), or a line break (Hermes). The model is
always asked with the generation prompt, so that is what it is trained on.
"""

import re

from ft_assets.chat.row_proofs import first_difference

TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]")
SIDES = re.compile(r"START|BEGIN|END|[^A-Za-z]")


def behind(context: str, prompt: str, written: str) -> str | None:
    """Return the context with the answer behind it; None if the answer would be in the thinking.

    context: the text that the model is given. prompt: the end of it, which the template adds to ask
    for an answer. written: the conversation up to the answer's end, as the template writes it.
    """
    start = max(0, first_difference(written, context) - len(prompt))
    for length in range(len(prompt), 0, -1):
        begun = prompt[:length]
        at = written.rfind(begun, start) if _is_whole(begun) else -1
        if at < 0:
            continue
        answer = written[at + length :]
        first = TAG.match(answer.lstrip())
        if first and any(_closes(tag, first.group()) for tag in TAG.findall(prompt)[-1:]):
            return None
        answer = _joined(prompt[length:], answer)
        return None if answer is None else context + answer
    return None


def always_asked(context: str, written: str) -> str:
    """Return the generation prompt of a template that writes it after answers too, or nothing.

    It begins with the last marker that context and conversation have in common.
    """
    at = first_difference(written, context)
    markers = [found.start() for found in TAG.finditer(context) if found.end() <= at]
    prompt = context[markers[-1] :] if markers else ""
    return prompt if prompt and written.endswith(prompt) else ""


def _joined(given: str, answer: str) -> str | None:
    """Return what of the answer follows the last text that only the generation prompt has."""
    if not given.strip():
        return answer
    tags, first = TAG.findall(given), TAG.match(answer.lstrip())
    if not tags:
        return None
    if first and first.group() == tags[-1]:
        return answer.lstrip()[first.end() :]
    return answer if any(_closes(tag, tags[-1]) for tag in tags[:-1]) else None


def _closes(opening: str, closing: str) -> bool:
    """Return True for <think> and </think>, <|channel> and <channel|>, and their like."""
    same = SIDES.sub("", opening) == SIDES.sub("", closing) != ""
    return same and opening != closing and "/" not in opening and "END" not in opening


def _is_whole(text: str) -> bool:
    """Return True if a text does not end inside a marker."""
    return text.rfind("<") <= text.rfind(">") and text.rfind("[") <= text.rfind("]")
