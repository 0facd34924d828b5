"""Canonical conversations and preferences: one form, validated with index-exact messages, ids by content.

A conversation is `{"id", "messages": [{"role", "content"}], "source", "group"}`, with `tools` where the row offers any
(turns.py says what else a turn can have); a preference adds `chosen` and `rejected`, each a string that the assistant
answers to `messages`. A plain text is one message of the role text. Ids are hashes of normalised content, so that they
survive reordering and renaming of files. `group` is what must stay on one side of the split: rows that share their
first user message (or a declared `group`) share it.
"""

import hashlib
import json
import re
import unicodedata
from typing import Any

from ft_assets.data.messages import checked, text, tools
from ft_assets.data.row_formats import RowProblem, conversation_turns, preference_turns


def normalise(text: str) -> str:
    """Return text for comparison: NFKC, lower case, letters and digits only, single blanks."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", text).strip()


def digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def conversation(raw: dict[str, Any], format: str | None = None) -> dict[str, Any]:
    """Return the canonical form of a conversation row, of the named format or of what its keys say. Raises RowProblem."""
    try:
        given = conversation_turns(raw, format)
        if format == "text":
            messages = [{"role": "text", "content": text("text", given[0]["content"])}]
            # No user asks for it: the text itself is what must stay on one side of the split.
            return {
                "id": _identity(messages, []),
                "messages": messages,
                "group": _group(raw, messages[0]["content"]),
            }
        messages = checked("messages", given)
        offered = tools(raw)
    except RecursionError:
        raise RowProblem("is nested too deeply") from None
    if messages[-1]["role"] != "assistant":
        raise RowProblem(
            f"messages[{len(messages) - 1}]: the last turn is the {messages[-1]['role']}'s; expected the assistant's answer"
        )
    if all(turn.get("train") is False for turn in messages if turn["role"] == "assistant"):
        raise RowProblem(
            "messages: no assistant turn is to be trained (train: false or weight: 0 on each)"
        )
    row = {
        "id": _identity(messages, offered),
        "messages": messages,
        "group": _group(raw, _asked(messages)),
    }
    return {**row, "tools": offered} if offered else row


def preference(raw: dict[str, Any], format: str | None = None) -> dict[str, Any]:
    """Return the canonical form of a preference row, of the named format or of what its keys say. Raises RowProblem."""
    try:
        turns, *answers = preference_turns(raw, format)
        messages = checked("prompt", turns)
        offered = tools(raw)
    except RecursionError:
        raise RowProblem("is nested too deeply") from None
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowProblem(
            f"prompt[{len(messages) - 1}]: the last turn is the {messages[-1]['role']}'s; expected the user's"
        )
    chosen, rejected = (
        text(name, value) for name, value in zip(("chosen", "rejected"), answers, strict=True)
    )
    if chosen.strip() == rejected.strip():
        raise RowProblem("chosen and rejected are equal; expected two different answers")
    row = {
        "id": _identity(
            [
                *messages,
                {"role": "assistant", "content": chosen},
                {"role": "rejected", "content": rejected},
            ],
            offered,
        ),
        "messages": messages,
        "chosen": chosen,
        "rejected": rejected,
        "group": _group(raw, _asked(messages)),
    }
    return {**row, "tools": offered} if offered else row


def _identity(messages: list[dict[str, Any]], offered: list[dict[str, Any]]) -> str:
    """Return the id: roles and texts alone where a row has no more, so that ids of plain conversations never change."""
    turns = [
        (turn["role"], turn["content"].strip(), *([extra] if (extra := _extra(turn)) else []))
        for turn in messages
    ]
    return digest(
        json.dumps(
            {"turns": turns, "tools": offered} if offered else turns,
            ensure_ascii=False,
            sort_keys=True,
        )
    )


def _extra(turn: dict[str, Any]) -> dict[str, Any]:
    """Return what a turn says besides role and text. Ids of calls are not part of it: they are random."""
    extra: dict[str, Any] = {"train": False} if turn.get("train") is False else {}
    return (
        {**extra, "tool_calls": [call["function"] for call in turn["tool_calls"]]}
        if "tool_calls" in turn
        else extra
    )


def _asked(messages: list[dict[str, Any]]) -> str:
    return next(turn["content"] for turn in messages if turn["role"] == "user")


def _group(raw: dict[str, Any], asked: str) -> str:
    group = raw.get("group")
    if group is None or (
        isinstance(group, str) and not group.strip()
    ):  # an empty cell of a table is no group
        return digest("prompt", normalise(asked))
    if not isinstance(group, str | int):
        raise RowProblem(f"group: is a {type(group).__name__}; expected a text or a whole number")
    return digest("group", text("group", str(group)))
