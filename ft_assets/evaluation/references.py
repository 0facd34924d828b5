"""The reference of each row, as text: what an answer is compared with.

It is the content of the row's last message without special tokens, because the decoding of answers
drops them too. A message with tool calls is compared as the model's own template writes them,
decoded as answers are. Its content alone would be an empty text, which no answer equals.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from ft_assets.rows.types import TokenizedRow


class ReferencedRow(TokenizedRow):
    """A tokenized row with the text that an answer is compared with."""

    reference: str


class ReferenceColumns(TypedDict, total=False):
    """The columns of a tokenized row that are stored where they differ; see TokenizedRow."""

    expected: str
    decoded: str


class ReferenceTexts:
    """Reads the reference of a tokenized row, and the text that its tokens decode to."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def columns(self, row: TokenizedRow) -> ReferenceColumns:
        """Return the columns `expected` and `decoded` of a row; see TokenizedRow."""
        decoded = self.decoded(row)
        content = row["messages"][-1]["content"].strip()
        reference = self._reference(row, decoded)
        columns: ReferenceColumns = {}
        if reference != content:
            columns["expected"] = reference
        if decoded != reference:
            columns["decoded"] = decoded
        return columns

    def reference(self, row: TokenizedRow) -> str:
        """Return the text that an answer is compared with."""
        return self._reference(row, None)

    def decoded(self, row: TokenizedRow) -> str:
        """Return the reference's tokens, without the end of turn, decoded as answers are."""
        begin, end = last_answer(row["supervised"])
        tokens = row["input_ids"][begin : end - 1]
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _reference(self, row: TokenizedRow, decoded: str | None) -> str:
        answer = row["messages"][-1]
        if answer.get("tool_calls"):
            return self.decoded(row) if decoded is None else decoded
        return self._special.sub("", answer["content"]).strip()


def with_references(tokenizer: Any, rows: Iterable[TokenizedRow]) -> list[ReferencedRow]:
    """Return the tokenized rows, each with its `reference`."""
    texts = ReferenceTexts(tokenizer)
    return [{**row, "reference": _stored_or(texts, row)} for row in rows]


def _stored_or(texts: ReferenceTexts, row: TokenizedRow) -> str:
    stored = row.get("expected")
    return texts.reference(row) if stored is None else stored


def stored_reference(row: Mapping[str, Any]) -> str:
    """Return the reference of a row that chat_dataset wrote; no tokenizer is needed."""
    stored = row.get("expected")
    return row["messages"][-1]["content"].strip() if stored is None else stored


def last_answer(supervised: list[bool]) -> tuple[int, int]:
    """Return the (begin, end) of the last supervised run: the answer with its end of turn."""
    end = len(supervised) - supervised[::-1].index(True)
    begin = end
    while begin and supervised[begin - 1]:
        begin -= 1
    return begin, end
