"""What an answer is compared with: the reference of each row, as text.

A turn's content, where it has no tool calls. A call is compared as the model's own template writes it, decoded as answers
are: its content alone would be an empty text that no answer equals.
"""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def with_references(tokenizer: Any, rows: Iterable[Row]) -> list[Row]:
    """Return the tokenized rows ({"messages", "input_ids", "supervised"}), each with its `reference`."""
    return [{**row, "reference": _reference(tokenizer, row)} for row in rows]


def _reference(tokenizer: Any, row: Row) -> str:
    answer = row["messages"][-1]
    if not answer.get("tool_calls"):
        return answer["content"]
    end = len(row["supervised"]) - row["supervised"][::-1].index(True)
    begin = end
    while begin and row["supervised"][begin - 1]:
        begin -= 1
    return tokenizer.decode(
        row["input_ids"][begin : end - 1], skip_special_tokens=True
    ).strip()  # without the end of turn
