"""Render conversations with the model's own template, find what is supervised, and have it proven.

The mask needs no markers in the template: each assistant turn is found by rendering the conversation up to it. Rows are
rendered as texts and tokenized in one call a batch. Where a template writes earlier turns otherwise than it wrote them
when they were last, a row becomes one sequence per supervised turn.
Not here: the proofs themselves (proofs.py, structure.py), where the template comes from (models/), truncation and splitting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from ft_assets.chat.calls import FORMS, CallForm, missing_calls, shaped
from ft_assets.chat.proofs import (
    Block,
    Facts,
    Messages,
    ProofFailed,
    Rendered,
    find_content,
    prove,
    prove_bos,
    prove_contents,
)
from ft_assets.chat.structure import CALL, PROBE, TOOL, Structures
from ft_assets.models.chat_template import (
    ANSWER,
    QUESTION,
    date_of,
    fold_system,
    frozen,
    prints_date,
)

__all__ = [
    "Facts",
    "ProofFailed",
    "Rendered",
    "Renderer",
    "fold_system",
    "prints_date",
    "prove",
    "render",
]

Row = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None


@dataclass
class _Plan:
    """A sequence before it is tokenized: its text, the turns it covers, and by supervised turn the text before it."""

    text: str
    messages: list[dict[str, Any]]
    contexts: dict[int, str]
    tools: Tools = None
    blocks: dict[int, Block] = field(default_factory=dict)
    upto: dict[int, str] = field(default_factory=dict)

    def turn_by_turn(self) -> "list[_Plan]":
        """Return a plan for each supervised turn alone."""
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


class Renderer:
    """Renders rows {"messages", optional "tools"} for one model.

    `stop_ids` are the tokens at which its generation stops; `day` is what a template prints that prints the date (None:
    what the snapshot says).
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], day: date | None = None) -> None:
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.day = day or date_of(tokenizer)
        self._form: CallForm | None = None
        self._blocks: set[Block] = set()
        self._structures = Structures(self.text)

    @cached_property
    def facts(self) -> Facts:
        """What the proofs need to know of this model."""
        return Facts(self.tokenizer, self.stop_ids, self._bos_use())

    def train(self, rows: Sequence[Row]) -> list[list[Rendered] | ProofFailed]:
        """Return each row's training sequences: one, or one per supervised turn where the template rewrites earlier turns."""
        plans = [
            self._attempt(self._text_plan if _is_text(row) else self._train_plans, row)
            for row in rows
        ]
        return self._finish(plans)

    def answers(self, rows: Sequence[Row]) -> list[tuple[list[int], list[int]] | ProofFailed]:
        """Return (prompt ids, answer ids with the end of turn) of rows whose last message is the assistant's answer."""
        found: list[tuple[list[int], list[int]] | ProofFailed] = []
        for done in self._finish([self._attempt(self._answer_plan, row) for row in rows]):
            if isinstance(done, ProofFailed):
                found.append(done)
            else:
                begin = done[0].supervised.index(True)
                found.append(
                    (
                        done[0].input_ids[:begin],
                        done[0].input_ids[begin : done[0].supervised.count(True) + begin],
                    )
                )
        return found

    def prompts(self, rows: Sequence[Row]) -> list[list[int] | ProofFailed]:
        """Return the token ids that the model is given to answer each row's messages."""
        texts = [self._attempt(self._prompt_text, row) for row in rows]
        encoded = iter(self.encode([text for text in texts if isinstance(text, str)]))
        found: list[list[int] | ProofFailed] = []
        for text in texts:
            if isinstance(text, ProofFailed):
                found.append(text)
                continue
            ids = next(encoded)
            try:
                prove_bos(self.facts, ids)
                found.append(ids)
            except ProofFailed as problem:
                found.append(problem)
        return found

    def text(self, messages: Messages, tools: Tools = None, generation_prompt: bool = False) -> str:
        """Return what the template writes. Raises ProofFailed with the template's own reason."""
        turns = self._shaped(messages)
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tools=list(tools) if tools else None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                chat_template=frozen(self.tokenizer.chat_template, self.day),
            )
        except (
            Exception
        ) as error:  # jinja raises its own classes, templates raise through raise_exception
            raise ProofFailed(_refusal(error, messages)) from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of rendered texts, all in one call; a template writes BOS itself."""
        return (
            self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
                "input_ids"
            ]
            if texts
            else []
        )

    def _attempt(self, plan: Any, row: Row) -> Any:
        try:
            return plan(row)
        except ProofFailed as problem:
            return problem

    def _train_plans(self, row: Row) -> list[_Plan]:
        messages, tools = row["messages"], row.get("tools")
        turns = [
            index
            for index, turn in enumerate(messages)
            if turn["role"] == "assistant" and turn.get("train") is not False
        ]
        if not turns:
            raise ProofFailed(
                "no turn to learn from: there is no assistant turn, or each says train: false"
            )
        contexts = {index: self._context(messages, index, tools) for index in turns}
        upto = {index: self.text(messages[: index + 1], tools) for index in turns}
        for index in turns:
            self._prove_prefix(upto[index], contexts[index], index, messages)
        whole = upto[turns[-1]]
        kept = all(self._kept(whole, contexts[index], upto[index]) for index in turns[:-1])
        plan = self._plan(messages, tools, whole, contexts, upto)
        return [plan] if kept else plan.turn_by_turn()

    def _answer_plan(self, row: Row) -> list[_Plan]:
        messages, tools = row["messages"], row.get("tools")
        last = len(messages) - 1
        if messages[last]["role"] != "assistant":
            raise ProofFailed(
                f"messages[{last}] ({messages[last]['role']}): the last message must be the assistant's answer"
            )
        whole, context = self.text(messages, tools), self._context(messages, last, tools)
        self._prove_prefix(whole, context, last, messages)
        return [self._plan(messages, tools, whole, {last: context}, {last: whole})]

    def _prompt_text(self, row: Row) -> str:
        text = self.text(row["messages"], row.get("tools"), generation_prompt=True)
        self._structures.prove(row["messages"], bool(row.get("tools")), generation_prompt=True)
        prove_contents(text, row["messages"], row.get("tools"))
        return text

    def _plan(
        self,
        messages: Messages,
        tools: Tools,
        text: str,
        contexts: dict[int, str],
        upto: dict[int, str],
    ) -> _Plan:
        covered = [dict(turn) for turn in messages[: max(contexts) + 1]]
        blocks = {
            index: block
            for index in contexts
            if any(block := self._block(messages, index, tools, contexts[index], upto[index]))
        }
        return _Plan(text, covered, contexts, tools, blocks, upto)

    def _context(self, messages: Messages, index: int, tools: Tools) -> str:
        if index == 0:
            raise ProofFailed(
                "messages[0] (assistant): nothing stands before the answer; begin with a user turn, or say train: false"
            )
        return self.text(messages[:index], tools, generation_prompt=True)

    def _prove_prefix(self, text: str, context: str, index: int, messages: Messages) -> None:
        if text.startswith(context):
            return
        first = messages[0]["content"] if messages[0]["role"] == "system" else ""
        if first and find_content(context, first) >= 0 > find_content(text, first):
            raise ProofFailed(
                f"messages[0] (system): the template writes this turn at generation and drops it once messages[{index}] (assistant) follows: "
                "set chat.system_turn: user, which puts it into the first user turn"
            )
        at = next(
            (
                place
                for place, (left, right) in enumerate(zip(text, context, strict=False))
                if left != right
            ),
            min(len(text), len(context)),
        )
        raise ProofFailed(
            f"messages[{index}] (assistant): the text before the answer differs from that given at generation: "
            f"after {context[max(0, at - 20) : at]!r} the model is given {context[at : at + 30]!r}, "
            f"the conversation has {text[at : at + 30]!r}: set chat.template_kwargs (enable_thinking?) or chat.chat_template so that both agree"
        )

    def _kept(self, whole: str, context: str, upto: str) -> bool:
        """Return whether a turn stands in the whole as it stood when it was last: up to the end of turn, nothing differs."""
        if not whole.startswith(context):
            return False
        ends = [
            found + len(stop)
            for stop in self._stops()
            if (found := upto.find(stop, len(context))) >= 0
        ]
        end = min(ends, default=len(upto))
        return whole[:end] == upto[:end]

    def _stops(self) -> list[str]:
        return [self.facts.decode([token]) for token in self.stop_ids]

    def _block(
        self, messages: Messages, index: int, tools: Tools, context: str, upto: str
    ) -> Block:
        """Return what the template writes between the context and the answer, and between it and the end of turn.

        It counts only if it is of markers, and the same whatever the answer is.
        """
        turn = messages[index]
        found = self._around(upto[len(context) :], turn["content"].strip())
        if turn.get("tool_calls") or not any(found) or found in self._blocks:
            return found if found in self._blocks else ("", "")
        probe = self.text([*messages[:index], {"role": "assistant", "content": ANSWER}], tools)
        if self._around(probe[len(context) :], ANSWER) != found or not all(
            self._marked(part) for part in found if part
        ):
            return ("", "")
        self._blocks.add(found)
        return found

    def _around(self, text: str, answer: str) -> Block:
        at = text.find(answer) if answer else -1
        if at < 0:
            return ("", "")
        tail = text[at + len(answer) :]
        end = min((found for stop in self._stops() if (found := tail.find(stop)) >= 0), default=0)
        return text[:at].strip(), tail[:end].strip()

    def _marked(self, block: str) -> bool:
        """Return whether a block is of markers: between brackets, or with one of the vocabulary's added tokens."""
        bounded = block.startswith(("<", "[")) and block.endswith((">", "]"))
        return bounded or any(
            token in self.tokenizer.added_tokens_decoder for token in self.encode([block])[0]
        )

    def _text_plan(self, row: Row) -> list[_Plan]:
        text, tokenizer = row["messages"][0]["content"], self.tokenizer
        if tokenizer.eos_token is None or tokenizer.eos_token_id not in self.facts.stop_ids:
            raise ProofFailed(
                f"messages[0] (text): the tokenizer's EOS {tokenizer.eos_token!r} is no token at which generation stops"
            )
        return [_Plan(text, [dict(row["messages"][0])], {})]

    def _finish(self, plans: list[Any]) -> list[list[Rendered] | ProofFailed]:
        """Tokenize the texts of all plans at once, make the masks, and prove them."""
        sequences = [plan for row in plans if not isinstance(row, ProofFailed) for plan in row]
        encoded = iter(
            self.encode(
                [text for plan in sequences for text in (plan.text, *plan.contexts.values())]
            )
        )
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
        """Return the proven sequences of a plan: one, or one per turn where a token would reach from a context into its answer.

        At generation the context is tokenized alone, so then the answer is too.
        """
        if not plan.contexts:
            return [self._plain(plan, ids)]
        if all(ids[: len(context)] == context for context in contexts.values()):
            return [self._sequence(plan, ids, contexts)]
        found = []
        for alone in plan.turn_by_turn():
            ((index, text),) = alone.contexts.items()
            whole, tail = self.encode([alone.text, alone.text[len(text) :]])
            if whole[: len(contexts[index])] == contexts[index]:
                found.append(self._sequence(alone, whole, {index: contexts[index]}))
                continue
            joined = contexts[index] + tail
            if self.facts.decode(joined) != self.facts.decode(
                whole
            ):  # tokenizers that put a space before a text
                joined = whole
            found.append(self._sequence(alone, joined, {index: contexts[index]}, apart=True))
        return found

    def _sequence(
        self, plan: _Plan, ids: list[int], contexts: dict[int, list[int]], apart: bool = False
    ) -> Rendered:
        supervised = [False] * len(ids)
        for context in contexts.values():
            begin = len(context)
            end = next(
                (
                    place + 1
                    for place in range(begin, len(ids))
                    if ids[place] in self.facts.stop_ids
                ),
                len(ids),
            )
            supervised[begin:end] = [True] * (end - begin)
        rendered = Rendered(
            ids,
            supervised,
            len(plan.messages),
            tuple(sorted({part for block in plan.blocks.values() for part in block if part})),
            apart,
        )
        prove(self.facts, rendered, plan.messages, contexts, plan.blocks)
        self._structures.prove(plan.messages, bool(plan.tools))
        prove_contents(plan.text, plan.messages, plan.tools)
        return rendered

    def _plain(self, plan: _Plan, ids: list[int]) -> Rendered:
        """Return a plain text: BOS if the tokenizer's own encoding has one, the text, EOS; all of it supervised."""
        tokenizer = self.tokenizer
        stray = next((token for token in ids if token in self.facts.stop_ids), None)
        if stray is not None:
            raise ProofFailed(
                f"messages[0] (text): holds {self.facts.decode([stray])!r}, at which generation stops; take it out"
            )
        if self.facts.decode(ids).strip() != plan.text.strip():
            raise ProofFailed(
                f"messages[0] (text): decodes to {self.facts.decode(ids)[:80]!r}, not to {plan.text[:80]!r}"
            )
        bos = tokenizer.bos_token_id
        if bos is not None and bos in ids:
            raise ProofFailed(
                f"messages[0] (text): holds BOS, {self.facts.decode([bos])!r}, which is put before the text; take it out"
            )
        whole = [*([bos] if self._own_bos() else []), *ids, int(tokenizer.eos_token_id)]
        return Rendered(whole, [True] * len(whole), 1)

    def _shaped(self, messages: Messages) -> list[dict[str, Any]]:
        if not any("tool_calls" in turn or turn["role"] == "tool" for turn in messages):
            return [_sent(turn) for turn in messages]
        if self._form is None:
            self._form = FORMS[0]
            self._form = next((form for form in FORMS if self._takes(form)), FORMS[0])
        return shaped([_sent(turn) for turn in messages], self._form)

    def _takes(self, form: CallForm) -> bool:
        """Return whether the template writes a call in this form as a call."""
        self._form = form
        try:
            context, text = self.text(PROBE[:1], [TOOL], True), self.text(PROBE[:2], [TOOL])
            return missing_calls(text[len(context) :], [CALL]) is None and bool(
                self.text(PROBE, [TOOL], True)
            )
        except ProofFailed:
            return False

    def _own_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _bos_use(self) -> Any:
        bos = self.tokenizer.bos_token_id
        turns = (
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": QUESTION},
        )
        counts = []
        for count in (1, 2, 3):
            try:
                counts.append(self.encode([self.text(turns[:count])])[0].count(bos))
            except ProofFailed:  # the rows' own proofs will say it
                continue
        if counts and max(counts) > counts[0]:
            return "turns"
        return "first" if self._own_bos() or any(counts) else "none"


def _is_text(row: Row) -> bool:
    return len(row["messages"]) == 1 and row["messages"][0]["role"] == "text"


def _sent(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template sees of a message: `train` is ours."""
    return {key: value for key, value in turn.items() if key != "train"}


def _refusal(error: Exception, messages: Messages) -> str:
    reason = f"the template refuses the conversation: {' '.join(str(error).split())[:200]}"
    if messages and messages[0]["role"] == "system" and "system" in str(error).lower():
        return (
            reason
            + ": set chat.system_turn: user, which puts the system turn into the first user turn"
        )
    return reason


def render(
    tokenizer: Any, messages: Messages, generation_prompt: bool = False, tools: Tools = None
) -> list[int]:
    """Return the token ids that the template makes of messages, unproven. Raises ProofFailed with its own reason."""
    renderer = Renderer(tokenizer, frozenset())
    return renderer.encode([renderer.text(messages, tools, generation_prompt)])[0]


def render_supervised(tokenizer: Any, messages: Messages, stop_ids: frozenset[int]) -> Rendered:
    """Return one conversation as one proven sequence. Raises ProofFailed, also where it takes one per turn."""
    done = Renderer(tokenizer, stop_ids).train([{"messages": messages}])[0]
    if isinstance(done, ProofFailed):
        raise done
    if len(done) > 1:
        raise ProofFailed(
            "the template rewrites earlier turns once later turns follow: the conversation is one sequence per turn"
        )
    return done[0]
