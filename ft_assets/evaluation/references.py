"""The reference of each row, as text: what an answer is compared with.

It is the content of the row's last message, unless that has tool calls. A call is compared as the
model's own template writes it, decoded as answers are. Its content alone would be an empty text,
which no answer equals.
"""

from collections.abc import Iterable
from typing import Any

from ft_assets.rows.types import TokenizedRow


class ReferencedRow(TokenizedRow):
    """A tokenized row with the text that an answer is compared with."""

    reference: str


def with_references(tokenizer: Any, rows: Iterable[TokenizedRow]) -> list[ReferencedRow]:
    """Return the tokenized rows, each with its `reference`."""
    return [{**row, "reference": _reference(tokenizer, row)} for row in rows]


def _reference(tokenizer: Any, row: TokenizedRow) -> str:
    answer = row["messages"][-1]
    if not answer.get("tool_calls"):
        return answer["content"]
    end = len(row["supervised"]) - row["supervised"][::-1].index(True)
    begin = end
    while begin and row["supervised"][begin - 1]:
        begin -= 1
    without_end_of_turn = row["input_ids"][begin : end - 1]
    return tokenizer.decode(without_end_of_turn, skip_special_tokens=True).strip()
