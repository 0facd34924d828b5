"""Write conversations as text with the model's own chat template, and learn how the template works.

The module finds the form of tool calls that the template takes, and how it uses BOS.
Not here: masks and proofs (rendering.py).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from typing import Any, Literal

from ft_assets.chat.calls import FORMS, CallForm, missing_calls, shaped
from ft_assets.chat.row_proofs import Facts, Messages, ProofFailed, SettingMayHelp, Tools
from ft_assets.chat.structure_proofs import CALL, PROBE, TOOL
from ft_assets.chat.thinking import CLOSE, Thinking, learn
from ft_assets.errors import TemplateError
from ft_assets.models.chat_template import ANSWER, CONTROL_KEY, CUT, QUESTION, date_of, frozen
from ft_assets.models.template_limits import RENDER_SECONDS, TooLong, limited
from ft_assets.rows.types import Message


class TemplateText:
    """Writes messages as text, and texts as token ids, for one model.

    `stop_ids` are the tokens at which its generation stops. `day` is the date that a template
    prints as today's (None: the snapshot's date). `escapes`: control tokens in texts are escaped.
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], day: date | None = None) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.day = day or date_of(tokenizer)
        self.escapes = tokenizer.init_kwargs.get(CONTROL_KEY) == "text"
        self._form: CallForm | None = None

    @cached_property
    def facts(self) -> Facts:
        """The facts about this model that the proofs need."""
        return Facts(self.tokenizer, self.stop_ids, self._bos_use(None), self.thinking)

    @cached_property
    def _facts_with_tools(self) -> Facts:
        return replace(self.facts, bos=self._bos_use([TOOL]))

    def facts_of(self, tools: Tools) -> Facts:
        """Return the facts for a row: some templates write BOS only if there are tools."""
        return self._facts_with_tools if tools else self.facts

    @cached_property
    def thinking(self) -> Thinking | None:
        """The way in which the template writes reasoning, or None."""

        def render(turns: Sequence[Any], prompted: bool) -> str | None:
            try:
                return self._rendered(turns, None, prompted)
            except ProofFailed:
                return None

        return learn(render, self.tokenizer.chat_template or "")

    def text(self, messages: Messages, tools: Tools = None, generation_prompt: bool = False) -> str:
        """Return the text that the template writes.

        Raises ProofFailed with the template's own reason, and TemplateError if it does not end.
        """
        return self._rendered(self._shaped(messages), tools, generation_prompt)

    def _rendered(self, messages: Messages, tools: Tools, generation_prompt: bool) -> str:
        try:
            with limited():
                return self.tokenizer.apply_chat_template(
                    messages,
                    tools=list(tools) if tools else None,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                    chat_template=frozen(self.tokenizer.chat_template, self.day),
                )
        except TooLong:
            size = sum(len(str(turn.get("content", ""))) for turn in messages)
            raise TemplateError(
                where="the chat template",
                found=f"writes a conversation of {len(messages)} turns and {size} characters for "
                f"more than {RENDER_SECONDS:g} s",
                expected="a template that ends",
                fix="set chat.chat_template to a template without such a loop",
            ) from None
        except Exception as error:  # jinja's own classes, and those of raise_exception in templates
            raise ProofFailed(_refusal(error, messages)) from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of rendered texts, all in one call. A template writes BOS itself.

        The parts of a text that CUT separates are tokenized apart, if control tokens are escaped.
        """
        if not texts:
            return []
        parts = [text.split(CUT) if self.escapes else [text] for text in texts]
        encoded = self.tokenizer(
            [part for text in parts for part in text],
            add_special_tokens=False,
            return_attention_mask=False,
        )["input_ids"]
        if len(encoded) == len(texts):
            return encoded
        ids = iter(encoded)
        return [[token for _ in text for token in next(ids)] for text in parts]

    def stops(self) -> list[str]:
        """Return the texts of the tokens at which generation stops."""
        return [self.facts.decode([token]) for token in self.stop_ids]

    def own_bos(self) -> bool:
        """Return True if the tokenizer's own encoding begins with BOS."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _shaped(self, messages: Messages) -> list[Message]:
        self._require_thinking(messages)
        turns = [self._as_seen(turn) for turn in messages]
        if not any("tool_calls" in turn or turn["role"] == "tool" for turn in turns):
            return turns
        if self._form is None:
            self._form = FORMS[0]
            self._form = next((form for form in FORMS if self._takes(form)), FORMS[0])
        return shaped(turns, self._form)

    def _as_seen(self, turn: Message) -> Message:
        """Return a message as the template sees it: `train` and `reasoned` are keys of ours."""
        seen = turn.copy()
        if self.thinking is not None:
            seen = self.thinking.seen(seen)
        seen.pop("train", None)
        seen.pop("reasoned", None)
        return seen

    def _require_thinking(self, messages: Messages) -> None:
        """Raise SettingMayHelp for reasoning that this template cannot tell from an answer."""
        index = next((i for i, turn in enumerate(messages) if turn.get("reasoned")), None)
        if self.thinking is not None or CLOSE in (self.tokenizer.chat_template or ""):
            return
        if index is not None:
            raise SettingMayHelp(
                f"messages[{index}] (assistant): has reasoning, and the base's chat template "
                "writes none before such an answer",
                "remove the reasoning, write it into content as the base does, or take a base that "
                "thinks",
            )

    def _takes(self, form: CallForm) -> bool:
        """Return True if the template writes a call in this form as a call."""
        self._form = form
        try:
            context = self.text(PROBE[:1], [TOOL], True)
            text = self.text(PROBE[:2], [TOOL])
            if missing_calls(text[len(context) :], [CALL]) is not None:
                return False
            return bool(self.text(PROBE, [TOOL], True))
        except ProofFailed:
            return False

    def _bos_use(self, tools: Tools) -> Literal["first", "none", "turns"]:
        bos = self.tokenizer.bos_token_id
        turns: list[Message] = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": QUESTION},
        ]
        counts: list[int] = []
        for length in (1, 2, 3):
            try:
                counts.append(self.encode([self.text(turns[:length], tools)])[0].count(bos))
            except ProofFailed:  # the proofs of the rows report it
                continue
        if counts and max(counts) > counts[0]:
            return "turns"
        return "first" if self.own_bos() or any(counts) else "none"


def _refusal(error: Exception, messages: Messages) -> str:
    reason = f"the template refuses the conversation: {' '.join(str(error).split())[:200]}"
    if messages and messages[0]["role"] == "system" and "system" in str(error).lower():
        advice = "set chat.system_turn: user, which puts the system turn into the first user turn"
        return f"{reason}: {advice}"
    if undefined := re.search(r"'(\w+)' is undefined", str(error)):
        return f"{reason}: set chat.template_kwargs: {{{undefined[1]}: …}}, which it needs"
    opening = next((turn["role"] for turn in messages if turn["role"] != "system"), None)
    if opening == "assistant":
        return f"{reason}: the assistant opens the conversation; remove its first turn from the row"
    return reason
