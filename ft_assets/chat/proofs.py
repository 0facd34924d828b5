"""The proofs of one rendered sequence. Each fails with its own message; none of them trusts how the mask was made.

Not here: rendering, and the choice of what one sequence covers (rendering.py).
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ft_assets.chat.calls import missing_calls

Messages = Sequence[Mapping[str, Any]]
Block = tuple[str, str]  # what a template writes before and after an answer


class ProofFailed(Exception):
    """A row whose rendering cannot be proven; the message says which proof, where, and what to do."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of a sequence and, for each, whether it is supervised.

    `turns`: how many messages of the row the sequence covers, from the first. `added`: blocks that the template itself
    writes before an answer and that are trained with it, e.g. an empty <think></think>. `apart`: the answer is tokenized
    apart from its context, as it is at generation, because in one piece tokens would reach over the border.
    """

    input_ids: list[int]
    supervised: list[bool]
    turns: int
    added: tuple[str, ...] = ()
    apart: bool = False


@dataclass(frozen=True)
class Facts:
    """What the proofs know of a model: its tokenizer, the tokens at which its generation stops, and how BOS is used.

    `bos`: `first` (once, at the start), `none`, or `turns` (BOS also opens or ends turns, as in SmolLM2 and Llama 2).
    """

    tokenizer: Any
    stop_ids: frozenset[int]
    bos: Literal["first", "none", "turns"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def prove(
    facts: Facts,
    rendered: Rendered,
    messages: Messages,
    contexts: Mapping[int, Sequence[int]],
    blocks: Mapping[int, Block] | None = None,
) -> None:
    """Raise ProofFailed unless the mask of `rendered` is right.

    contexts: for each message that is to be supervised, the tokens that the model is given at generation. blocks: what
    the template itself writes before and after an answer, of those messages where it writes something.
    """
    ids, runs = rendered.input_ids, _runs(rendered.supervised)
    for index, context in contexts.items():
        if ids[: len(context)] != list(context):
            raise ProofFailed(_differs(facts, index, ids, context))
    for begin, end in runs:
        if not any(begin == len(context) for context in contexts.values()):
            raise ProofFailed(_stray(facts, begin, end, ids, messages, contexts))
    ends = dict(runs)
    for index, context in sorted(contexts.items()):
        begin = len(context)
        if begin not in ends:
            raise ProofFailed(
                f"messages[{index}] (assistant): is to be learnt, and its first token is not supervised"
            )
        _prove_span(
            facts,
            ids[begin : ends[begin]],
            ids[ends[begin] :],
            messages[index],
            index,
            (blocks or {}).get(index, ("", "")),
        )
    prove_bos(facts, ids)


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the (begin, end) of each run of True."""
    data, runs, end = bytes(flags), [], 0
    while (begin := data.find(b"\x01", end)) >= 0:
        end = data.find(b"\x00", begin)
        end = len(data) if end < 0 else end
        runs.append((begin, end))
    return runs


def _differs(facts: Facts, index: int, ids: Sequence[int], context: Sequence[int]) -> str:
    at = next(
        (
            place
            for place, (left, right) in enumerate(zip(ids, context, strict=False))
            if left != right
        ),
        min(len(ids), len(context)),
    )
    return (
        f"messages[{index}] (assistant): the tokens before the answer differ from those given at generation, from token {at} on: "
        f"{facts.decode(ids[at : at + 8])!r} is trained, {facts.decode(context[at : at + 8])!r} is given"
    )


def _stray(
    facts: Facts,
    begin: int,
    end: int,
    ids: Sequence[int],
    messages: Messages,
    contexts: Mapping[int, Sequence[int]],
) -> str:
    text = facts.decode(ids[begin:end])[:80]
    held = next(
        (
            number
            for number, turn in enumerate(messages)
            if turn["content"].strip() and turn["content"].strip() in text
        ),
        None,
    )
    if held is not None and held not in contexts:
        return f"messages[{held}] ({messages[held]['role']}): is supervised and must not be: tokens {begin} to {end} are {text!r}"
    return f"tokens {begin} to {end} are supervised and begin where no answer begins: {text!r}"


def _prove_span(
    facts: Facts,
    span: Sequence[int],
    rest: Sequence[int],
    message: Mapping[str, Any],
    index: int,
    block: Block,
) -> None:
    where = f"messages[{index}] (assistant)"
    if span[-1] not in facts.stop_ids:
        raise ProofFailed(
            f"{where}: the supervised tokens end with {facts.decode(span[-1:])!r}, no token at which generation stops "
            f"({_named(facts)}): the model would not learn to stop"
        )
    early = next((place for place, token in enumerate(span[:-1]) if token in facts.stop_ids), None)
    if early is not None:
        raise ProofFailed(
            f"{where}: {facts.decode(span[early : early + 1])!r}, at which generation stops, stands within the supervised tokens "
            f"{facts.decode(span)[:80]!r}: correct the answer's text, or the template"
        )
    text = facts.decode(span[:-1])
    if message.get("tool_calls"):
        lost = missing_calls(text, message["tool_calls"])
        if lost is not None and missing_calls(facts.decode(rest), message["tool_calls"]) is None:
            raise ProofFailed(
                f"{where}: the template writes the tool call behind {facts.decode(span[-1:])!r}, at which generation stops"
            )
        if lost is not None:
            raise ProofFailed(
                f"{where}: {lost} in what the template writes, {text[:80]!r}: set chat.chat_template to one that writes it"
            )
        if find_content(text, message["content"]) < 0:
            raise ProofFailed(
                f"{where}: the template drops the text beside the tool call, {message['content'][:60]!r}"
            )
        return
    before, after = block
    if text.strip().startswith(before) and text.strip().endswith(after):
        text = text.strip()[len(before) : len(text.strip()) - len(after)]
    if not same_text(text, message["content"]):
        raise ProofFailed(
            f"{where}: the supervised tokens decode to {text[:80]!r}, not to the answer {message['content'][:80]!r}: "
            "the template changes or adds to it; set chat.chat_template to one that does not"
        )


def _named(facts: Facts) -> str:
    return ", ".join(sorted(repr(facts.decode([token])) for token in facts.stop_ids))


def same_text(left: str, right: str) -> bool:
    """Return whether two texts are the same but for outer white space, that around <think> tags, and Unicode's NFC
    (which tokenizers such as Qwen's apply)."""
    if left.strip() == right.strip():
        return True
    return _plain(left) == _plain(right)


def _plain(text: str) -> str:
    return re.sub(r"\s*(</?think>)\s*", r"\1", unicodedata.normalize("NFC", text)).strip()


def prove_bos(facts: Facts, ids: Sequence[int]) -> None:
    """Raise ProofFailed if BOS stands elsewhere, or more or less often, than this model has it."""
    bos = facts.tokenizer.bos_token_id
    if bos is None:
        return
    count = list(ids).count(bos)
    if facts.bos == "turns":
        if len(ids) > 1 and ids[0] == ids[1] == bos:
            raise ProofFailed(
                "BOS stands twice at the start; expected once: take it out of the template"
            )
    elif facts.bos == "first" and (count != 1 or ids[0] != bos):
        place = "at the start" if count and ids[0] == bos else "not at the start"
        raise ProofFailed(
            f"BOS stands {count} times, {place if count else 'nowhere'}; expected once, at the start: "
            + (
                "take one out of the template, or the text"
                if count
                else "the template must begin with {{ bos_token }}"
            )
        )
    elif facts.bos == "none" and count:
        raise ProofFailed(
            f"BOS stands {count} times; neither the tokenizer nor the template puts it: take it out of the text"
        )


def prove_contents(
    text: str, messages: Messages, tools: Sequence[Mapping[str, Any]] | None
) -> None:
    """Raise ProofFailed unless every turn's content and calls stand in the rendered text, in order, and so do the tools.

    A system turn and tools may stand anywhere: some templates put them into the last user turn. Thinking of earlier
    turns may be left out, which is what templates of thinking models are for.
    """
    position, last = 0, len(messages) - 1
    for index, message in enumerate(messages):
        content, role = message["content"], message["role"]
        if role == "system":
            if find_content(text, content) < 0:
                raise ProofFailed(dropped(index, role, content, text))
            continue
        found = find_content(text, content, position)
        if found < 0 and role == "assistant" and index < last and "</think>" in content:
            content = content.rpartition("</think>")[2]
            found = find_content(text, content, position)
        if found < 0 and role == "assistant" and find_content(_plain(text), _plain(content)) >= 0:
            found = position
        if found < 0 and message.get("tool_calls"):
            raise ProofFailed(
                f"messages[{index}] (assistant): the template drops the text beside the tool call, {content[:60]!r}"
            )
        if found < 0:
            raise ProofFailed(dropped(index, role, content, text))
        if message.get("tool_calls"):
            lost = _lost_call(text[position:], message)
            if lost:
                raise ProofFailed(f"messages[{index}] (assistant): {lost} in the rendered text")
        position = max(position, found)
    for tool in tools or []:
        lost = _lost_tool(text, tool)
        if lost:
            raise ProofFailed(
                f"tools: the template drops {lost}: remove the tools, or set chat.chat_template to one that writes them"
            )


def _lost_call(text: str, message: Mapping[str, Any]) -> str | None:
    """Return what is missing of a turn's calls in the text from that turn on, where later calls may follow."""
    for call in message["tool_calls"]:
        lost = missing_calls(text, [call])
        if lost and not lost[0].isdigit():  # a count would count later turns' calls too
            return lost
    return None


def find_content(text: str, content: str, position: int = 0) -> int:
    """Return where a turn's content stands in the text, as it is or escaped as JSON; -1 if it does not."""
    content = content.strip()
    forms = (content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1])
    return next((found for form in forms if (found := text.find(form, position)) >= 0), -1)


def dropped(index: int, role: str, content: str, text: str) -> str:
    """Return the message about a turn that is not in the rendered text, or not as it was."""
    where = f"messages[{index}] ({role})"
    first = next(iter(content.split()), "")
    if first and first in text and len(content.split()) > 1 and content.split()[-1] in text:
        return f"{where}: the template changes its text, {content[:60]!r}, or puts it out of order: set chat.chat_template to one that does not"
    advice = {
        "system": "set chat.system_turn: user, which puts it into the first user turn",
        "tool": "the template has no tool turns; set chat.chat_template to one that has",
    }
    return f"{where}: the template drops this turn, {content[:60]!r}: " + advice.get(
        role, "set chat.chat_template to one that keeps it"
    )


def _lost_tool(text: str, tool: Mapping[str, Any]) -> str | None:
    function = tool.get("function", tool)
    if function["name"] not in text:
        return f"the tool {function['name']}"
    if find_content(text, function.get("description") or "") < 0:
        return f"the description of the tool {function['name']}"
    properties = (function.get("parameters") or {}).get("properties") or {}
    lost = next((name for name in properties if name not in text), None)
    return f"the parameter {lost} of the tool {function['name']}" if lost else None
