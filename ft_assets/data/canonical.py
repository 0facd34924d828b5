"""Turn raw rows into canonical, validated conversations and preferences, with ids by content.

The messages of a RowProblem name the index of the wrong turn. Ids are hashes of normalised
content, so they survive reordering and renaming of files. `group` must stay on one side of the
split: rows that share all context before the judged answer (or a declared `group`) share it.
"""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

from ft_assets.data.units import normalise
from ft_assets.rows.cells import plain
from ft_assets.rows.messages import answer, checked
from ft_assets.rows.row_formats import conversation_turns, preference_turns, prompt_turns
from ft_assets.rows.tools import tools
from ft_assets.rows.types import (
    AnsweredRow,
    DataRow,
    FunctionCall,
    Message,
    Preference,
    RawFields,
    Tool,
)
from ft_assets.rows.values import RowProblem, parsed, text

# A message as its id sees it: role, text, and the other parts if it has any.
_Identified = tuple[str, str] | tuple[str, str, dict[str, bool | list[FunctionCall]]]


def digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def conversation(raw: RawFields, format: str | None = None) -> AnsweredRow:
    """Return the canonical form of a conversation row.

    The row has the named format, or the format that its keys show. Raises RowProblem.
    """
    raw = plain(raw)
    try:
        turns = conversation_turns(raw, format)
        if format == "text":
            return _plain_text(raw, text("text", turns[0]["content"]))
        messages = checked("messages", turns)
        offered = tools(raw)
        options = _options(raw)
    except RecursionError:
        raise RowProblem("is nested too deeply") from None
    if messages[-1]["role"] != "assistant":
        raise RowProblem(
            f"messages[{len(turns) - 1}]: the last turn is the {messages[-1]['role']}'s; "
            "expected the assistant's answer"
        )
    if all(turn.get("train") is False for turn in messages if turn["role"] == "assistant"):
        raise RowProblem(
            "messages: no assistant turn is to be trained (train: false or weight: 0 on each)"
        )
    row: AnsweredRow = {
        "id": _identity(messages, offered, options),
        "messages": messages,
        "group": _group(raw, context_key(messages[:-1], offered)),
    }
    _note_joined(row, len(turns) - len(messages))
    if offered:
        row["tools"] = offered
    if options:
        row["options"] = options
    return row


def _options(raw: RawFields) -> list[str]:
    """Return the answers to choose from: the field `options`, if it is a list of texts."""
    given = raw.get("options")
    if isinstance(given, str):  # a cell of a CSV file
        with suppress(RowProblem):
            given = parsed("options", given)
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        return []
    return [text(f"options[{index}]", one) for index, one in enumerate(given)]


def _plain_text(raw: RawFields, content: str) -> AnsweredRow:
    messages: list[Message] = [{"role": "text", "content": content}]
    # It has no user turn: the text itself must stay on one side of the split.
    group = _group(raw, context_key(messages, []))
    return {"id": _identity(messages, []), "messages": messages, "group": group}


def preference(raw: RawFields, format: str | None = None) -> Preference:
    """Return the canonical form of a preference row.

    The row has the named format, or the format that its keys show. A labelled answer, which has no
    partner (data/kto.py), has "" in the place of the other answer. Raises RowProblem.
    """
    raw = plain(raw)
    if "chosen" not in raw and "messages" in raw and isinstance(raw.get("label"), bool):
        return _labelled(raw)
    try:
        turns, *answers = preference_turns(raw, format)
        messages = checked("prompt", turns)
        offered = tools(raw)
    except RecursionError:
        raise RowProblem("is nested too deeply") from None
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowProblem(
            f"prompt[{len(turns) - 1}]: the last turn is the {messages[-1]['role']}'s; "
            "expected the user's"
        )
    turns_of = [answer(*both) for both in zip(("chosen", "rejected"), answers, strict=True)]
    chosen, rejected = (turn["content"] for turn in turns_of)
    if _composed(chosen) == _composed(rejected):
        raise RowProblem("chosen and rejected are equal; expected two different answers")
    answered: list[Message] = [
        *messages,
        {"role": "assistant", "content": chosen},
        {"role": "rejected", "content": rejected},
    ]
    row: Preference = {
        "id": _identity(answered, offered),
        "messages": messages,
        "chosen": chosen,
        "rejected": rejected,
        "group": _group(raw, context_key(messages, offered)),
    }
    _note_joined(row, len(turns) - len(messages))
    # No table stores it: annotators.py finds the pairs on which annotators disagree.
    cast(dict[str, object], row)["answers"] = _answers_key(messages, offered, chosen, rejected)
    if any(turn.get("reasoned") for turn in turns_of):
        row["reasoned"] = True
    if offered:
        row["tools"] = offered
    return row


def _labelled(raw: RawFields) -> Preference:
    """Return a labelled answer as half of a pair."""
    whole = conversation({key: value for key, value in raw.items() if key != "label"})
    *messages, last = whole["messages"]
    role = "assistant" if raw["label"] else "rejected"
    offered = whole.get("tools", [])
    row: Preference = {
        "id": _identity([*messages, {"role": role, "content": last["content"]}], offered),
        "messages": messages,
        "chosen": last["content"] if raw["label"] else "",
        "rejected": "" if raw["label"] else last["content"],
        "group": whole["group"],
    }
    if last.get("reasoned"):
        row["reasoned"] = True
    if offered:
        row["tools"] = offered
    return row


def prompt(raw: RawFields, format: str | None = None) -> DataRow:
    """Return the prompt of a row of production: its turns before the last answer, if it has one.

    The row has the named format, or the format that its keys show. Raises RowProblem.
    """
    raw = plain(raw)
    try:
        turns = prompt_turns(raw, format)
        messages = checked("prompt", turns)
        offered = tools(raw)
    except RecursionError:
        raise RowProblem("is nested too deeply") from None
    joined = len(turns) - len(messages)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise RowProblem("has no prompt: no user's turn is last, or before the last answer")
    row: DataRow = {
        "id": _identity(messages, offered),
        "messages": messages,
        "group": context_key(messages, offered),
    }
    _note_joined(row, joined)
    if offered:
        row["tools"] = offered
    return row


def _answers_key(messages: list[Message], offered: list[Tool], chosen: str, rejected: str) -> str:
    """Return a key of a prompt and two answers, whichever of them is preferred."""
    prompt = [f"{turn['role']}\x1e{turn['content'].strip()}" for turn in messages]
    calls = [turn["tool_calls"] for turn in messages if "tool_calls" in turn]
    tools = [json.dumps([calls, offered], sort_keys=True)] if calls or offered else []
    return digest(*prompt, *tools, *sorted((chosen.strip(), rejected.strip())))


def _composed(answer: str) -> str:
    """Return an answer in Unicode's NFC: many tokenizers give both forms the same tokens."""
    return unicodedata.normalize("NFC", answer).strip()


def _identity(
    messages: list[Message], offered: list[Tool], options: list[str] | None = None
) -> str:
    """Return the id of a row.

    It hashes only roles and texts where a row has nothing else, so that the ids of plain
    conversations never change.
    """
    turns = [_identified(turn) for turn in messages]
    others = {key: value for key, value in (("tools", offered), ("options", options)) if value}
    content = {"turns": turns, **others} if others else turns
    return digest(json.dumps(content, ensure_ascii=False, sort_keys=True))


def _identified(turn: Message) -> _Identified:
    """Return the parts of a turn that its id covers. Ids of calls are random, so it skips them."""
    extra: dict[str, bool | list[FunctionCall]] = {}
    if turn.get("train") is False:
        extra["train"] = False
    if "tool_calls" in turn:
        extra["tool_calls"] = [call["function"] for call in turn["tool_calls"]]
    role, content = turn["role"], turn["content"].strip()
    return (role, content, extra) if extra else (role, content)


def _note_joined(row: DataRow, turns: int) -> None:
    """Note how many user turns were joined, for the counts of ingest.py. No table stores it."""
    if turns:
        cast(dict[str, object], row)["joined"] = turns


def context_key(context: Sequence[Message], offered: Sequence[Tool]) -> str:
    """Return the key of a prompt: of its tools and all its turns, normalised, with their roles.

    Equal keys are the same prompt but for case, blanks, and punctuation.
    """
    turns = [_asked(turn) for turn in context]
    content = [*turns, *([offered] if offered else [])]
    return digest("context", json.dumps(content, ensure_ascii=False, sort_keys=True))


def _asked(turn: Message) -> list[str | list[FunctionCall]]:
    # A text that has only punctuation is compared as it is.
    said = normalise(turn["content"]) or turn["content"].strip()
    calls = [call["function"] for call in turn.get("tool_calls", [])]
    return [turn["role"], said, *([calls] if calls else [])]


def _group(raw: RawFields, context: str) -> str:
    group = raw.get("group")
    # An empty cell of a table is not a group.
    if group is None or (isinstance(group, str) and not group.strip()):
        return context
    if not isinstance(group, str | int):
        raise RowProblem(f"group: is a {type(group).__name__}; expected a text or a whole number")
    return digest("group", text("group", str(group)))
