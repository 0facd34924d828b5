"""Prove one rendered sequence. Each proof fails with its own message and does not trust the mask.

Not here: rendering, and the choice of the turns that a sequence covers (rendering.py).
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ft_assets.chat.calls import missing_calls
from ft_assets.chat.thinking import Thinking, split
from ft_assets.rows.types import Message, Tool

Messages = Sequence[Message]
Tools = Sequence[Tool] | None
Block = tuple[str, str]  # the texts that a template writes before and after an answer


class ProofFailed(Exception):
    """A row whose rendering cannot be proven.

    The message names the proof and the place, and gives advice.
    """


class SettingMayHelp(ProofFailed):
    """A row that another setting of the template may help. `otherwise`: advice if none does."""

    def __init__(self, problem: str, otherwise: str) -> None:
        super().__init__(problem)
        self.otherwise = otherwise


@dataclass(frozen=True)
class Rendered:
    """Token ids of a sequence and, for each, whether it is supervised.

    `turns`: the number of messages that the sequence covers, from the first. `added`: blocks that
    the template itself writes before an answer and that are trained with it, e.g. an empty
    <think></think>. `apart`: the answer is tokenized apart from its context, as at generation,
    because in one piece tokens would reach across the border.
    """

    input_ids: list[int]
    supervised: list[bool]
    turns: int
    added: tuple[str, ...] = ()
    apart: bool = False

    def prompt_and_answer(self) -> tuple[list[int], list[int]]:
        """Return the ids before the first supervised run, and the ids of this run."""
        begin, end = _runs(self.supervised)[0]
        return self.input_ids[:begin], self.input_ids[begin:end]


@dataclass(frozen=True)
class Facts:
    """The facts about a model that the proofs need.

    `stop_ids`: the tokens at which its generation stops. `bos`: `first` (BOS once, at the start),
    `none`, or `turns` (BOS also opens or ends turns, as in SmolLM2 and Llama 2). `thinking`: the
    way in which its template writes reasoning.
    """

    tokenizer: Any
    stop_ids: frozenset[int]
    bos: Literal["first", "none", "turns"]
    thinking: Thinking | None = None

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

    `contexts`: for each message to supervise, the tokens that the model is given at generation.
    `blocks`: the texts that the template itself writes before and after an answer, by message.
    """
    ids, runs = rendered.input_ids, _runs(rendered.supervised)
    for index, context in contexts.items():
        if ids[: len(context)] != list(context):
            raise ProofFailed(_differs(facts, index, ids, context))
    begins = {len(context) for context in contexts.values()}
    for begin, end in runs:
        if begin not in begins:
            raise ProofFailed(_stray(facts, begin, end, ids, messages, contexts))
    ends = dict(runs)
    for index, context in sorted(contexts.items()):
        begin = len(context)
        if begin not in ends:
            raise ProofFailed(
                f"messages[{index}] (assistant): is to be learnt, "
                "and its first token is not supervised"
            )
        span = _Span(facts, ids[begin : ends[begin]], ids[ends[begin] :], messages[index], index)
        span.prove((blocks or {}).get(index, ("", "")))
    prove_bos(facts, ids)


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the (begin, end) of each run of True."""
    data = bytes(flags)
    runs: list[tuple[int, int]] = []
    end = 0
    while (begin := data.find(b"\x01", end)) >= 0:
        end = data.find(b"\x00", begin)
        end = len(data) if end < 0 else end
        runs.append((begin, end))
    return runs


def first_difference(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return the first place at which two sequences differ, or the length of the shorter one."""
    pairs = enumerate(zip(left, right, strict=False))
    shorter = min(len(left), len(right))
    return next((place for place, (one, other) in pairs if one != other), shorter)


def _differs(facts: Facts, index: int, ids: Sequence[int], context: Sequence[int]) -> str:
    at = first_difference(ids, context)
    return (
        f"messages[{index}] (assistant): the tokens before the answer differ from those given at "
        f"generation, from token {at} on: {facts.decode(ids[at : at + 8])!r} is trained, "
        f"{facts.decode(context[at : at + 8])!r} is given"
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
    contents = (turn["content"].strip() for turn in messages)
    found = (number for number, content in enumerate(contents) if content and content in text)
    held = next(found, None)
    if held is not None and held not in contexts:
        return (
            f"messages[{held}] ({messages[held]['role']}): is supervised and must not be: "
            f"tokens {begin} to {end} are {text!r}"
        )
    return f"tokens {begin} to {end} are supervised and begin where no answer begins: {text!r}"


@dataclass(frozen=True)
class _Span:
    """The supervised tokens of one answer, the tokens after them, and the answer's message."""

    facts: Facts
    ids: Sequence[int]
    rest: Sequence[int]
    message: Message
    index: int

    def prove(self, block: Block) -> None:
        """Raise ProofFailed unless the span is the answer and its end of turn, and nothing else."""
        self._prove_end()
        text = self.facts.decode(self.ids[:-1])
        if self.message.get("tool_calls"):
            self._prove_calls(text)
            return
        parts = split(self.message)
        if parts is not None and parts[0] not in text:
            raise drops_reasoning(self.index)
        if parts is not None and self.facts.thinking is not None:
            self._prove_reasoned(self.facts.thinking, text, *parts)
            return
        before, after = block
        if text.strip().startswith(before) and text.strip().endswith(after):
            text = text.strip()[len(before) : len(text.strip()) - len(after)]
        if not same_text(text, self.message["content"]):
            raise self._failed(
                f"the supervised tokens decode to {text[:80]!r}, not to the answer "
                f"{self.message['content'][:80]!r}: "
                "the template changes or adds to it; set chat.chat_template to one that does not"
            )

    def _prove_end(self) -> None:
        facts, ids = self.facts, self.ids
        if ids[-1] not in facts.stop_ids:
            stops = ", ".join(sorted(repr(facts.decode([token])) for token in facts.stop_ids))
            raise self._failed(
                f"the supervised tokens end with {facts.decode(ids[-1:])!r}, which is not a token "
                f"at which generation stops ({stops}): the model would not learn to stop"
            )
        places = (place for place, token in enumerate(ids[:-1]) if token in facts.stop_ids)
        early = next(places, None)
        if early is not None:
            raise self._failed(
                f"{facts.decode(ids[early : early + 1])!r}, at which generation stops, is within "
                f"the supervised tokens {facts.decode(ids)[:80]!r}: "
                "correct the answer's text, or the template"
            )

    def _prove_calls(self, text: str) -> None:
        calls = self.message.get("tool_calls", [])
        lost = missing_calls(text, calls)
        if lost is not None and missing_calls(self.facts.decode(self.rest), calls) is None:
            raise self._failed(
                "the template writes the tool call behind "
                f"{self.facts.decode(self.ids[-1:])!r}, at which generation stops"
            )
        if lost is not None:
            raise self._failed(
                f"{lost} in the text of the template, {text[:80]!r}: "
                "set chat.chat_template to one that writes it"
            )
        thought, answer = split(self.message) or ("", self.message["content"])
        if find_content(text, thought) < 0:
            raise drops_reasoning(self.index)
        if find_content(text, answer) < 0:
            raise self._failed(_drops_text_beside_call(answer))

    def _prove_reasoned(self, thinking: Thinking, text: str, thought: str, answer: str) -> None:
        """Raise ProofFailed unless a text is reasoning and answer as the template writes them."""
        if thinking.opened is None:
            raise SettingMayHelp(
                f"messages[{self.index}] (assistant): has reasoning, and the model is asked for an "
                "answer without",
                "remove the reasoning, or set chat.chat_template to one that asks with thinking",
            )
        if answer not in text and answer in self.facts.decode(self.rest):
            raise self._failed(
                "the template writes the answer behind its reasoning and "
                f"{self.facts.decode(self.ids[-1:])!r}, at which generation stops"
            )
        if not thinking.is_in(text, thought, answer):
            raise self._failed(
                f"the supervised tokens decode to {text[:80]!r}, not to the reasoning "
                f"{thought[:40]!r} and the answer {answer[:40]!r}: the template changes them or "
                "adds to them; set chat.chat_template to one that does not"
            )

    def _failed(self, problem: str) -> ProofFailed:
        return ProofFailed(f"messages[{self.index}] (assistant): {problem}")


def drops_reasoning(index: int) -> SettingMayHelp:
    """Return the problem of an answer whose reasoning the template does not write."""
    return SettingMayHelp(
        f"messages[{index}] (assistant): the template drops the reasoning of the answer",
        "remove it from the rows, or set chat.chat_template to one that writes it",
    )


def _drops_text_beside_call(content: str) -> str:
    return f"the template drops the text beside the tool call, {content[:60]!r}"


def same_text(left: str, right: str) -> bool:
    """Return True if two texts are equal but for white space and Unicode's NFC.

    The white space is around the text and around <think> tags. Tokenizers such as Qwen's apply NFC.
    """
    return left.strip() == right.strip() or _plain(left) == _plain(right)


def _plain(text: str) -> str:
    return re.sub(r"\s*(</?think>)\s*", r"\1", unicodedata.normalize("NFC", text)).strip()


def prove_bos(facts: Facts, ids: Sequence[int]) -> None:
    """Raise ProofFailed unless BOS is where this model has it, and as often."""
    bos = facts.tokenizer.bos_token_id
    if bos is None:
        return
    count = list(ids).count(bos)
    if facts.bos == "turns":
        if len(ids) > 1 and ids[0] == ids[1] == bos:
            raise ProofFailed(
                "BOS is twice at the start; expected once: take one out of the template"
            )
    elif facts.bos == "first" and (count != 1 or ids[0] != bos):
        place = "at the start" if count and ids[0] == bos else "not at the start"
        advice = (
            "take one out of the template, or the text"
            if count
            else "the template must begin with {{ bos_token }}"
        )
        raise ProofFailed(
            f"BOS occurs {count} times{f', {place}' if count else ''}; "
            f"expected once, at the start: {advice}"
        )
    elif facts.bos == "none" and count:
        raise ProofFailed(
            f"BOS occurs {count} times; neither the tokenizer nor the template writes it: "
            "take it out of the text"
        )


def prove_contents(text: str, messages: Messages, tools: Tools) -> None:
    """Raise ProofFailed unless the rendered text has the content and calls of every turn, in order.

    It must have the tools too. A system turn and tools may be anywhere: some templates put them
    into the last user turn. The thinking of earlier turns may be absent, because templates of
    thinking models drop it.
    """
    position = 0
    for index, message in enumerate(messages):
        if message["role"] == "system":
            if find_content(text, message["content"]) < 0:
                raise ProofFailed(dropped(index, "system", message["content"], text))
            continue
        found = _find_turn(text, message, position, last=index == len(messages) - 1)
        calls = message.get("tool_calls")
        where = f"messages[{index}] (assistant)"
        if found < 0 and (parts := split(message)) and find_content(text, parts[0]) < 0:
            raise drops_reasoning(index)
        if found < 0 and calls:
            raise ProofFailed(f"{where}: {_drops_text_beside_call(message['content'])}")
        if found < 0:
            raise ProofFailed(dropped(index, message["role"], message["content"], text))
        if calls and (lost := _lost_call(text[position:], message)):
            raise ProofFailed(f"{where}: {lost} in the rendered text")
        position = max(position, found)
    for tool in tools or []:
        if lost := _lost_tool(text, tool):
            raise ProofFailed(
                f"tools: the template drops {lost}: remove the tools, "
                "or set chat.chat_template to one that writes them"
            )


def _find_turn(text: str, message: Message, position: int, last: bool) -> int:
    """Return the place of a turn's content at or after `position`, or -1."""
    content = message["content"]
    found = find_content(text, content, position)
    if found >= 0 or message["role"] != "assistant":
        return found
    if (parts := split(message)) is not None:
        thought, content = parts
        if last and find_content(text, thought, position) < 0:
            return -1
        found = find_content(text, content, position)
    if found < 0 and find_content(_plain(text), _plain(content)) >= 0:
        return position
    return found


def _lost_call(text: str, message: Message) -> str | None:
    """Return a description of the first call of a turn that is missing from the turn's text on.

    Later calls may follow in the text.
    """
    for call in message.get("tool_calls", []):
        lost = missing_calls(text, [call])
        if lost and not lost[0].isdigit():  # a count would count the calls of later turns too
            return lost
    return None


def find_content(text: str, content: str, position: int = 0) -> int:
    """Return the place of a turn's content in the text, as written or escaped as JSON, or -1."""
    content = content.strip()
    forms = (content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1])
    return next((found for form in forms if (found := text.find(form, position)) >= 0), -1)


def dropped(index: int, role: str, content: str, text: str) -> str:
    """Return the message about a turn that the rendered text does not have, or has changed."""
    where = f"messages[{index}] ({role})"
    words = content.split()
    if find_content(text, content) >= 0 or (
        len(words) > 1 and words[0] in text and words[-1] in text
    ):
        return (
            f"{where}: the template changes its text, {content[:60]!r}, or puts it out of order: "
            "set chat.chat_template to one that does not"
        )
    advice = {
        "system": "set chat.system_turn: user, which puts it into the first user turn",
        "tool": "the template has no tool turns; set chat.chat_template to one that has",
    }.get(role, "set chat.chat_template to one that keeps it")
    return f"{where}: the template drops this turn, {content[:60]!r}: {advice}"


def _lost_tool(text: str, tool: Tool) -> str | None:
    function = tool["function"]
    if function["name"] not in text:
        return f"the tool {function['name']}"
    if find_content(text, function.get("description") or "") < 0:
        return f"the description of the tool {function['name']}"
    properties = (function.get("parameters") or {}).get("properties")
    if not isinstance(properties, dict):
        return None
    lost = next((name for name in properties if name not in text), None)
    return f"the parameter {lost} of the tool {function['name']}" if lost else None
