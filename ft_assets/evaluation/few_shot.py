"""The prompt of the prompted base: the examples before the row's own turns. No torch."""

from collections.abc import Sequence

from ft_assets.rows.types import DataRow, Message


def few_shot_prompt(
    messages: list[Message], system: str | None, examples: Sequence[DataRow]
) -> list[Message]:
    """Return the messages of the prompted base.

    They are the system turn (`system`, else the row's own), the turns of the examples, and those of
    the row.
    """
    own = next((turn["content"] for turn in messages if turn["role"] == "system"), None)
    first = system or own
    turns: list[Message] = [{"role": "system", "content": first}] if first else []
    for example in examples:
        turns += [turn for turn in example["messages"] if turn["role"] != "system"]
    return turns + [turn for turn in messages if turn["role"] != "system"]
