"""Render conversations with the model's own template, find the supervised tokens, and prove both.

The mask needs no markers in the template: each assistant turn is found by rendering the
conversation up to it. Rows are rendered as texts and tokenized in one call a batch. If a template
writes earlier turns differently once later turns follow, a row becomes one sequence per supervised
turn.
Not here: the proofs (row_proofs.py, structure_proofs.py), the text that a template writes
(template_text.py), the source of the template (models/), truncation and splitting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any, TypeVar, cast

from ft_assets.chat.advice import Advice
from ft_assets.chat.control_tokens import ControlTokens
from ft_assets.chat.row_proofs import (
    Block,
    Facts,
    Messages,
    ProofFailed,
    Rendered,
    SettingMayHelp,
    Tools,
    find_content,
    first_difference,
    prove,
    prove_bos,
    prove_contents,
)
from ft_assets.chat.sampled_context import always_asked, behind
from ft_assets.chat.structure_proofs import Structures
from ft_assets.chat.template_text import TemplateText
from ft_assets.chat.thinking import split
from ft_assets.models.chat_template import (
    ANSWER,
    CUT,
    QUESTION,
    fold_system,
    prints_date,
    with_template,
)
from ft_assets.rows.types import Conversation, Message

__all__ = ["Facts", "ProofFailed", "Rendered", "Renderer", "fold_system", "prints_date", "prove"]

PlanT = TypeVar("PlanT")
NO_BLOCK: Block = ("", "")


@dataclass
class _Plan:
    """A sequence before it is tokenized.

    `contexts`: by supervised turn, the text before its answer. `upto`: the text up to its end.
    """

    text: str
    messages: list[Message]
    contexts: dict[int, str]
    tools: Tools = None
    blocks: dict[int, Block] = field(default_factory=dict)
    upto: dict[int, str] = field(default_factory=dict)

    def turn_by_turn(self) -> "list[_Plan]":
        """Return one plan for each supervised turn."""
        return [
            _Plan(
                self.upto[index],
                self.messages[: index + 1],
                {index: context},
                self.tools,
                {index: self.blocks[index]} if index in self.blocks else {},
                {index: self.upto[index]},
            )
            for index, context in self.contexts.items()
        ]


class Renderer(TemplateText):
    """Renders the conversations of rows for one model."""

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: frozenset[int],
        day: date | None = None,
        advises: bool = True,
    ) -> None:
        super().__init__(tokenizer, stop_ids, day)
        self._advises = advises
        self._advice: dict[Any, Advice] = {}
        self._blocks: set[Block] = set()
        self._structures = Structures(self.text)
        self._controls = ControlTokens(tokenizer, stop_ids, self.escapes, self.text, self.encode)

    def train(self, rows: Sequence[Conversation]) -> list[list[Rendered] | ProofFailed]:
        """Return the training sequences of each row.

        A row has one sequence, or one per supervised turn if the template rewrites earlier turns.
        """
        done = self._finish([_attempt(self._train_plans, row) for row in rows])
        return self._advised(rows, done, Renderer.train)

    def answers(
        self, rows: Sequence[Conversation]
    ) -> list[tuple[list[int], list[int]] | ProofFailed]:
        """Return (prompt ids, answer ids with the end of turn) of each row.

        The last message of a row is the assistant's answer.
        """
        return [
            done if isinstance(done, ProofFailed) else done.prompt_and_answer()
            for done in self.answer_sequences(rows)
        ]

    def answer_sequences(self, rows: Sequence[Conversation]) -> list[Rendered | ProofFailed]:
        """Return the sequence of each row, in which only its last message is supervised."""
        finished = self._finish([_attempt(self._answer_plan, row) for row in rows])
        finished = self._advised(rows, finished, Renderer.answer_sequences)
        return [done if isinstance(done, ProofFailed) else done[0] for done in finished]

    def prompts(self, rows: Sequence[Conversation]) -> list[list[int] | ProofFailed]:
        """Return the token ids that the model is given to answer the messages of each row."""
        texts = [_attempt(self._prompt_text, row) for row in rows]
        encoded = iter(self.encode([text for text in texts if isinstance(text, str)]))
        found: list[list[int] | ProofFailed] = []
        for row, text in zip(rows, texts, strict=True):
            if isinstance(text, ProofFailed):
                found.append(text)
                continue
            ids = next(encoded)
            try:
                if self.escapes and CUT in text:
                    self._controls.prove_escaped(text, ids)
                prove_bos(self.facts_of(row.get("tools")), ids)
                found.append(ids)
            except ProofFailed as problem:
                found.append(problem)
        return found

    def _advised(
        self,
        rows: Sequence[Conversation],
        done: list[list[Rendered] | ProofFailed],
        render: "Callable[[Renderer, Sequence[Conversation]], Sequence[Any]]",
    ) -> list[list[Rendered] | ProofFailed]:
        """Return the results of rows, and with each problem the setting that helps, if any."""

        def proves(template: str, row: Conversation) -> bool:
            tokenizer = with_template(self.tokenizer, template)
            other = Renderer(tokenizer, self.stop_ids, self.day, advises=False)
            return not isinstance(render(other, [row])[0], ProofFailed)

        advice = self._advice.setdefault(render, Advice(self.tokenizer.chat_template, proves))
        return [
            advice.of(row, one) if self._advises and isinstance(one, SettingMayHelp) else one
            for row, one in zip(rows, done, strict=True)
        ]

    # Plans: the text of each sequence, and the texts before its answers

    def _train_plans(self, row: Conversation) -> list[_Plan]:
        messages, tools = row["messages"], row.get("tools")
        if len(messages) == 1 and messages[0]["role"] == "text":
            return self._text_plan(messages[0])
        messages = self._controls.escaped(row)["messages"]
        self._controls.prove_absent(messages, tools)
        turns = [
            index
            for index, turn in enumerate(messages)
            if turn["role"] == "assistant" and turn.get("train") is not False
        ]
        if not turns:
            raise ProofFailed(
                "no turn to learn from: there is no assistant turn, or each has train: false"
            )
        contexts = {index: self._context(messages, index, tools) for index in turns}
        upto = {
            index: self._answered(messages[: index + 1], tools, contexts[index]) for index in turns
        }
        for index in turns:
            _prove_prefix(upto[index], contexts[index], index, messages)
        whole = upto[turns[-1]]
        kept = all(self._kept(whole, contexts[index], upto[index]) for index in turns[:-1])
        plan = self._plan(messages, tools, whole, contexts, upto)
        return [plan] if kept else plan.turn_by_turn()

    def _answer_plan(self, row: Conversation) -> list[_Plan]:
        messages, tools = row["messages"], row.get("tools")
        last = len(messages) - 1
        if messages[last]["role"] != "assistant":
            raise ProofFailed(
                f"messages[{last}] ({messages[last]['role']}): "
                "the last message must be the assistant's answer"
            )
        messages = self._controls.escaped(row)["messages"]
        self._controls.prove_absent(messages, tools)
        context = self._context(messages, last, tools)
        whole = self._answered(messages, tools, context)
        _prove_prefix(whole, context, last, messages)
        return [self._plan(messages, tools, whole, {last: context}, {last: whole})]

    def _text_plan(self, message: Message) -> list[_Plan]:
        tokenizer = self.tokenizer
        if tokenizer.eos_token is None or tokenizer.eos_token_id not in self.facts.stop_ids:
            raise ProofFailed(
                f"messages[0] (text): the tokenizer's EOS {tokenizer.eos_token!r} is not a token "
                "at which generation stops"
            )
        return [_Plan(message["content"], [message], {})]

    def _prompt_text(self, row: Conversation) -> str:
        messages, tools = self._controls.escaped(row)["messages"], row.get("tools")
        self._controls.prove_absent(messages, tools)
        text = self.text(messages, tools, generation_prompt=True)
        self._structures.prove(messages, bool(tools), generation_prompt=True)
        prove_contents(text, messages, tools)
        return text

    def _plan(
        self,
        messages: Messages,
        tools: Tools,
        text: str,
        contexts: dict[int, str],
        upto: dict[int, str],
    ) -> _Plan:
        covered = [turn.copy() for turn in messages[: max(contexts) + 1]]
        blocks = {
            index: block
            for index in contexts
            if any(block := self._block(messages, index, tools, contexts[index], upto[index]))
        }
        return _Plan(text, covered, contexts, tools, blocks, upto)

    def _context(self, messages: Messages, index: int, tools: Tools) -> str:
        if index == 0:
            raise ProofFailed(
                "messages[0] (assistant): nothing is before the answer; "
                "begin with a user turn, or set train: false"
            )
        return self.text(messages[:index], tools, generation_prompt=True)

    def _answered(self, messages: Messages, tools: Tools, context: str) -> str:
        """Return the text up to the last turn's end, behind the context that the model is given.

        It does not begin with the context if the answer would be in thinking that is not closed.
        """
        text = self.text(messages, tools)
        if not text.startswith(context):
            asked = self.text(messages[:-1], tools)
            prompt = context[first_difference(asked, context) :]
            if not prompt:  # the template always asks for an answer, after an answer too
                prompt = always_asked(context, text)
                text = text.removesuffix(prompt)
            if prompt and prompt == self._plain_prompt and text.startswith(asked):
                text = context + text[len(asked) :]
            text = behind(context, prompt, text) or text
        return text + self._end_by_next(messages, tools, text[len(context) :])

    @cached_property
    def _plain_prompt(self) -> str | None:
        """The generation prompt, if the answer to a question stands right behind it.

        Apertus writes results of tools into the turn of the assistant, and asks for another one.
        """
        turns: list[Message] = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
        try:
            asked, context = self.text(turns[:1]), self.text(turns[:1], None, True)
            answered = self.text(turns).startswith(context + ANSWER)
        except ProofFailed:
            return None
        return context[len(asked) :] if answered and context.startswith(asked) else None

    def _end_by_next(self, messages: Messages, tools: Tools, answer: str) -> str:
        """Return the stop token that the template writes only once a user turn follows.

        The marker of the next turn ends an answer of GLM-4.6, for example. It is empty if the
        answer has its own end, or if what follows is no stop token.
        """
        if any(stop in answer for stop in self.stops()):
            return ""
        asked: Message = {"role": "user", "content": QUESTION}
        try:
            longer = self.text([*messages, asked], tools)
        except ProofFailed:
            return ""
        # The reasoning of the answer may be gone once a user turn follows.
        parts = split(messages[-1])
        tail = answer[answer.rfind(parts[1]) :] if parts and parts[1] in answer else answer
        at = longer.rfind(tail) if tail.strip() else -1
        after = longer[at + len(tail) :] if at >= 0 else ""
        ends = (stop for stop in self.stops() if after.lstrip().startswith(stop))
        return next(ends, "")

    def _kept(self, whole: str, context: str, upto: str) -> bool:
        """Return True if the whole text has a turn as it was when the turn was the last one.

        Everything up to its end of turn must be equal.
        """
        if not whole.startswith(context):
            return False
        ends = [
            found + len(stop)
            for stop in self.stops()
            if (found := upto.find(stop, len(context))) >= 0
        ]
        end = min(ends, default=len(upto))
        return whole[:end] == upto[:end]

    def _block(
        self, messages: Messages, index: int, tools: Tools, context: str, upto: str
    ) -> Block:
        """Return the texts that the template writes before the answer and before its end of turn.

        They count only if they are markers, and the same whatever the answer is.
        """
        turn = messages[index]
        if split(turn) is not None:
            return NO_BLOCK
        found = self._around(upto[len(context) :], turn["content"].strip())
        if found in self._blocks:
            return found
        if turn.get("tool_calls") or not any(found):
            return NO_BLOCK
        probed: Message = {"role": "assistant", "content": ANSWER}
        probe = self._answered([*messages[:index], probed], tools, context)
        same = self._around(probe[len(context) :], ANSWER) == found
        if not same or not all(self._is_marker(part) for part in found if part):
            return NO_BLOCK
        self._blocks.add(found)
        return found

    def _around(self, text: str, answer: str) -> Block:
        at = text.find(answer) if answer else -1
        if at < 0:
            return NO_BLOCK
        tail = text[at + len(answer) :]
        end = min((found for stop in self.stops() if (found := tail.find(stop)) >= 0), default=0)
        return text[:at].strip(), tail[:end].strip()

    def _is_marker(self, block: str) -> bool:
        """Return True if a block is in brackets or has an added token of the vocabulary."""
        bounded = block.startswith(("<", "[")) and block.endswith((">", "]"))
        added = self.tokenizer.added_tokens_decoder
        return bounded or any(token in added for token in self.encode([block])[0])

    # Sequences: tokens, masks, proofs

    def _finish(
        self, plans: Sequence[list[_Plan] | ProofFailed]
    ) -> list[list[Rendered] | ProofFailed]:
        """Tokenize the texts of all plans in one call, make the masks, and prove them."""
        sequences = [plan for row in plans if not isinstance(row, ProofFailed) for plan in row]
        texts = [text for plan in sequences for text in (plan.text, *plan.contexts.values())]
        encoded = iter(self.encode(texts))
        finished: list[list[Rendered] | ProofFailed] = []
        for row in plans:
            if isinstance(row, ProofFailed):
                finished.append(row)
                continue
            tokens = [
                (plan, next(encoded), {index: next(encoded) for index in plan.contexts})
                for plan in row
            ]
            try:
                finished.append(
                    [sequence for parts in tokens for sequence in self._sequences(*parts)]
                )
            except ProofFailed as problem:
                finished.append(problem)
        return finished

    def _sequences(
        self, plan: _Plan, ids: list[int], contexts: dict[int, list[int]]
    ) -> list[Rendered]:
        """Return the proven sequences of a plan.

        A plan has one sequence, or one per turn if a token would reach from a context into its
        answer. At generation the context is tokenized alone, so the answer is then too.
        """
        if not plan.contexts:
            return [self._plain(plan, ids)]
        if all(ids[: len(context)] == context for context in contexts.values()):
            return [self._sequence(plan, ids, contexts)]
        found: list[Rendered] = []
        for alone in plan.turn_by_turn():
            ((index, text),) = alone.contexts.items()
            context = {index: contexts[index]}
            whole, tail = self.encode([alone.text, alone.text[len(text) :]])
            if whole[: len(contexts[index])] == contexts[index]:
                found.append(self._sequence(alone, whole, context))
                continue
            joined = contexts[index] + tail
            # Some tokenizers put a space before a text.
            if self.facts.decode(joined) != self.facts.decode(whole):
                joined = whole
            found.append(self._sequence(alone, joined, context, apart=True))
        return found

    def _sequence(
        self, plan: _Plan, ids: list[int], contexts: dict[int, list[int]], apart: bool = False
    ) -> Rendered:
        stop_ids = self.facts.stop_ids
        supervised = [False] * len(ids)
        for context in contexts.values():
            begin = len(context)
            places = (place + 1 for place in range(begin, len(ids)) if ids[place] in stop_ids)
            end = next(places, len(ids))
            supervised[begin:end] = [True] * (end - begin)
        added = sorted({part for block in plan.blocks.values() for part in block if part})
        rendered = Rendered(ids, supervised, len(plan.messages), tuple(added), apart)
        messages = plan.messages
        if self.escapes and CUT in plan.text:
            self._controls.prove_escaped(plan.text, ids)
            messages = [
                cast(Message, {**turn, "content": turn["content"].replace(CUT, "")})
                for turn in plan.messages
            ]
        prove(self.facts_of(plan.tools), rendered, messages, contexts, plan.blocks)
        self._structures.prove(plan.messages, bool(plan.tools))
        prove_contents(plan.text, plan.messages, plan.tools)
        return rendered

    def _plain(self, plan: _Plan, ids: list[int]) -> Rendered:
        """Return the sequence of a plain text: BOS if the tokenizer's encoding has it, text, EOS.

        All of it is supervised.
        """
        tokenizer, decode = self.tokenizer, self.facts.decode
        stray = next((token for token in ids if token in self.facts.stop_ids), None)
        if stray is not None:
            raise ProofFailed(
                f"messages[0] (text): holds {decode([stray])!r}, at which generation stops; "
                "take it out"
            )
        if decode(ids).strip() != plan.text.strip():
            raise ProofFailed(
                f"messages[0] (text): decodes to {decode(ids)[:80]!r}, not to {plan.text[:80]!r}"
            )
        bos = tokenizer.bos_token_id
        if bos is not None and bos in ids:
            raise ProofFailed(
                f"messages[0] (text): holds BOS, {decode([bos])!r}, which is put before the text; "
                "take it out"
            )
        self._controls.prove_absent([{"role": "text", "content": plan.text}])
        whole = [*([bos] if self.own_bos() else []), *ids, int(tokenizer.eos_token_id)]
        return Rendered(whole, [True] * len(whole), 1)


def _attempt(plan: Callable[[Conversation], PlanT], row: Conversation) -> PlanT | ProofFailed:
    try:
        return plan(row)
    except ProofFailed as problem:
        return problem


def _prove_prefix(text: str, context: str, index: int, messages: Messages) -> None:
    """Raise ProofFailed unless a text begins with the text that the model is given."""
    if text.startswith(context):
        return
    first = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if first and find_content(context, first) >= 0 > find_content(text, first):
        raise ProofFailed(
            "messages[0] (system): the template writes this turn at generation and drops it once "
            f"messages[{index}] (assistant) follows: "
            "set chat.system_turn: user, which puts it into the first user turn"
        )
    at = first_difference(text, context)
    raise SettingMayHelp(
        f"messages[{index}] (assistant): "
        "the text before the answer differs from that given at generation: "
        f"after {context[max(0, at - 20) : at]!r} the model is given {context[at : at + 30]!r}, "
        f"the conversation has {text[at : at + 30]!r}",
        "set chat.chat_template to one with which both agree"
        + ("" if split(messages[index]) else ", or give the answers their reasoning"),
    )
