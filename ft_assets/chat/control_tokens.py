"""Find control tokens in the texts of a row: they would forge the structure of a conversation.

A control token is a special token of the tokenizer, a token at which generation stops, or a marker
that the chat template writes. With `chat.control_tokens: text` the turns' texts are escaped: a mark
within each control token makes `encode` tokenize both parts apart, so that it becomes plain text.
Not here: the control tokens that the template itself writes (rendering.py).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from ft_assets.chat.row_proofs import Messages, ProofFailed, Tools
from ft_assets.models.chat_template import ANSWER, CUT, MARKER, QUESTION
from ft_assets.rows.types import Conversation, Message

Write = Callable[..., str]  # (messages, tools, generation prompt) -> text


class ControlTokens:
    """The control tokens of a model. `write` renders messages, `encode` tokenizes texts."""

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: frozenset[int],
        escapes: bool,
        write: Write,
        encode: Callable[[Sequence[str]], list[list[int]]],
    ) -> None:
        template = tokenizer.chat_template or ""
        self._tokenizer = tokenizer
        self.texts = {
            token: added.content
            for token, added in tokenizer.added_tokens_decoder.items()
            if token != tokenizer.unk_token_id  # any text that the vocabulary lacks
            and (
                added.special
                or token in stop_ids
                or (MARKER.fullmatch(added.content) and added.content in template)
            )
        }
        # A normalizer could make a control token of another text, so every text is tokenized then.
        self._normalized = tokenizer.backend_tokenizer.normalizer is not None and any(
            tokenizer.added_tokens_decoder[token].normalized for token in self.texts
        )
        self._write = write
        self._encode = encode
        self.escapes = escapes

    def escaped(self, row: Conversation) -> Conversation:
        """Return a row with CUT within each control token of its turns, if they are escaped."""
        if not self.escapes:
            return row

        def cut(turn: Message) -> Message:
            def halves(match: re.Match[str]) -> str:
                return f"{match[0][:1]}{CUT}{match[0][1:]}"

            return {**turn, "content": self._pattern.sub(halves, turn["content"])}

        if any(CUT in turn["content"] for turn in row["messages"]):
            raise ProofFailed("a turn has U+FDD0, which is not a character: take it out")
        return {**row, "messages": [cut(turn) for turn in row["messages"]]}

    def prove_escaped(self, text: str, ids: Sequence[int]) -> None:
        """Raise ProofFailed unless each cut of a text took one control token away, and no text."""
        whole = self._encode([text.replace(CUT, "")])[0]
        left = sum(token in self.texts for token in whole) - text.count(CUT)
        same = self._decode(ids) == self._decode(whole)
        if not same or sum(token in self.texts for token in ids) != left:
            raise ProofFailed(
                "the base's tokenizer cannot write a control token as text: take it out of the "
                "text (chat.control_tokens: text)"
            )

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self.texts.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def prove_absent(self, messages: Messages, tools: Tools = None) -> None:
        """Raise ProofFailed, with the turn and the token, if a text has a control token."""
        for where, text in _texts(messages, tools):
            if not self._normalized and self._suspicious.search(text) is None:
                continue
            if self._looks_rendered(text.replace(CUT, "")):
                raise ProofFailed(
                    f"{where}: is it already templated? It has {self._opening.strip()!r}, with "
                    "which the base's template opens a user's turn: give the text alone, or turns "
                    "in `messages`"
                )
            found = self._first(text)
            if found is not None:
                raise ProofFailed(
                    f"{where}: has {found!r}, a control token of the base, which the model reads "
                    "as structure and not as text: take it out, or set chat.control_tokens: text"
                )

    @cached_property
    def _suspicious(self) -> re.Pattern[str]:
        """The pattern of all texts that are checked further: most texts have no match."""
        opening = self._opening.strip()
        marks = [self._pattern.pattern, CUT, *([re.escape(opening)] if opening else [])]
        return re.compile("|".join(marks))

    def _first(self, text: str) -> str | None:
        """Return the first control token to which a text encodes, or None."""
        if not self._normalized and self._pattern.search(text) is None:
            return None
        ids = self._encode([text])[0]
        return next((self.texts[token] for token in ids if token in self.texts), None)

    def _looks_rendered(self, text: str) -> bool:
        """Return True if a text has the template's own opening of a user's turn.

        An opening without control tokens, such as `USER:`, must begin the text, and the opening of
        the answer must follow. Where control tokens are escaped, any opening must begin the text.
        """
        opening, answer = self._opening.strip(), self._answer.strip()
        if not opening:
            return False
        if self._pattern.search(opening):
            return text.lstrip().startswith(opening) if self.escapes else opening in text
        return bool(answer) and text.lstrip().startswith(opening) and answer in text

    @cached_property
    def _opening(self) -> str:
        """The text with which the template opens a user's turn, at the start and later."""
        turns = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": QUESTION},
        ]
        try:
            first = self._write(turns[:1]).partition(QUESTION)[0]
            later = self._write(turns).rpartition(QUESTION)[0].rpartition(ANSWER)[2]
        except ProofFailed:  # the proofs of the rows report it
            return ""
        # The end of the answer before it, such as <|im_end|>, is not a part of the opening.
        end = self._pattern.match(later.lstrip())
        rest = later.lstrip()[end.end() :].lstrip() if end else later
        if self._pattern.search(rest) or not first.endswith(later.lstrip()):
            later = rest
        return next((later[at:] for at in range(len(later)) if first.endswith(later[at:])), "")

    @cached_property
    def _answer(self) -> str:
        """The text between a user's turn and the answer."""
        try:
            return self._write([{"role": "user", "content": QUESTION}], None, True).rpartition(
                QUESTION
            )[2]
        except ProofFailed:
            return ""


def _texts(messages: Messages, tools: Tools) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of each text of a row that the template writes."""
    for index, turn in enumerate(messages):
        where = f"messages[{index}] ({turn['role']})"
        content = turn["content"]
        # Some bases write reasoning in special tokens.
        if turn["role"] == "assistant" and "think>" in content:
            content = content.replace("<think>", "").replace("</think>", "")
        yield where, content
        for call in turn.get("tool_calls", ()):
            yield f"{where}: tool call", json.dumps(call["function"], ensure_ascii=False)
    for index, tool in enumerate(tools or ()):
        yield f"tools[{index}]", json.dumps(tool["function"], ensure_ascii=False)
