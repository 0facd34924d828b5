"""Turn the cells of a table into the values of a row: what a container adds is not content.

A table of texts holds a list of turns as JSON, or as Python writes it. `datasets` turns a list of
objects into an object of lists, and writes the fields of its schema as nulls. pandas writes NaN
where there is no value.
"""

import ast
import json
import re
from typing import Any

from ft_assets.rows.row_formats import COMPLETION, CONVERSATIONS, PROMPT, RANKED, RANKS
from ft_assets.rows.types import RawFields

# Columns that hold lists. Their text is the text of a list.
_LISTS = {*CONVERSATIONS, *RANKED, *RANKS, "history", "tools", "functions", "options"}
# Columns that hold a text, or turns. Their text is a list only if it is one of turns.
_TURNS = {*PROMPT, *COMPLETION, "chosen", "rejected"} - _LISTS
_HOLD_TURNS = {*CONVERSATIONS, *PROMPT, *COMPLETION, "chosen", "rejected"}
_HAVE_OBJECTS = _HOLD_TURNS | {"tools", "functions"}
_ROLES, _CONTENTS = ("role", "from"), ("content", "value")
# numpy writes no commas between the elements of an array; a text in Python has no raw line break.
_NO_COMMA = re.compile(r"\}\s*\n\s*\{")


def plain(raw: RawFields) -> RawFields:
    """Return a row whose values are those of JSON. A value that is plain is not changed."""
    changed: RawFields = {}
    by_schema = False
    for key, value in raw.items():
        kind = type(value)
        if kind is str:
            if value[:1] in "[{ \n" and (key in _LISTS or key in _TURNS):
                found = _parsed(value)
                if isinstance(found, list) and (key in _LISTS or _are_turns(found)):
                    changed[key] = found
                elif isinstance(found, dict) and key in CONVERSATIONS:
                    changed[key] = _as_list(found)
        elif kind is dict:
            changed[key] = _as_list(value)
        elif kind is list and key in _HOLD_TURNS and _has_nulls_of_a_schema(value):
            by_schema = True
        elif kind is float and value != value:
            changed[key] = None
    if by_schema:
        values = {**raw, **changed}
        changed |= {key: _without_nulls(values[key]) for key in _HAVE_OBJECTS & values.keys()}
    return {**raw, **changed} if changed else raw


def python_object(text: str) -> RawFields | None:
    """Return the object that a line holds as Python writes it, or None."""
    value = _parsed(text) if text.lstrip().startswith("{'") else None
    return value if isinstance(value, dict) else None


def _has_nulls_of_a_schema(turns: list[Any]) -> bool:
    """Return True if turns have keys without a value, which a table's schema gave them.

    A null `content` is none of these: a turn with tool calls has it in OpenAI's format.
    """
    for turn in turns:
        if type(turn) is dict and None in turn.values() and _lacks_more_than_content(turn):
            return True
    return False


def _lacks_more_than_content(turn: dict[str, Any]) -> bool:
    return any(part is None and key != "content" for key, part in turn.items())


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _parsed(cell: str) -> Any:
    """Return the list or object that a text holds, as JSON or as Python writes it, or None."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(_NO_COMMA.sub("},{", cell.strip()))
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _are_turns(value: list[Any]) -> bool:
    return bool(value) and all(
        isinstance(turn, dict)
        and any(name in turn for name in _ROLES)
        and any(name in turn for name in _CONTENTS)
        for turn in value
    )


def _as_list(value: dict[str, Any]) -> Any:
    """Return the turns of an object of lists, {"role": [...], "content": [...]}, or the value."""
    parts = list(value.values())
    is_turns = any(name in value for name in _ROLES) and any(name in value for name in _CONTENTS)
    if not is_turns or not all(isinstance(part, list) for part in parts):
        return value
    if len({len(part) for part in parts}) != 1:
        return value
    return [
        {key: part for key, part in zip(value, turn, strict=True) if part is not None}
        for turn in zip(*parts, strict=True)
    ]
