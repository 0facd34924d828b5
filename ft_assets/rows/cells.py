"""Turn the cells of a table into the values of a row: what a container adds is not content.

A table of texts holds a list of turns as JSON, or as Python writes it. `datasets` turns a list of
objects into an object of lists. pandas writes NaN where there is no value.
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
_ROLES, _CONTENTS = ("role", "from"), ("content", "value")
# numpy writes no commas between the elements of an array; a text in Python has no raw line break.
_NO_COMMA = re.compile(r"\}\s*\n\s*\{")


def plain(raw: RawFields) -> RawFields:
    """Return a row whose values are those of JSON. A value that is plain is not changed."""
    changed: RawFields = {}
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
        elif kind is float and value != value:
            changed[key] = None
    return {**raw, **changed} if changed else raw


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
