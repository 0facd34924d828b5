"""Check the tools that a raw row offers, and the tool calls of its turns.

The results have OpenAI's spelling.
"""

from typing import Any

from ft_assets.rows.types import JsonObject, RawFields, Tool, ToolCall
from ft_assets.rows.values import RowProblem, parsed, require_json, shown, word

ARGUMENTS = ("arguments", "parameters")  # OpenAI's key of a call, and Llama's
CALL_KEYS = frozenset(("id", "type", "function", "index"))
FUNCTION_KEYS = frozenset(("name", *ARGUMENTS))


def tools(raw: RawFields) -> list[Tool]:
    """Return the tools of a row, or [] if it has none. Raises RowProblem."""
    given = [key for key in ("tools", "functions") if raw.get(key) not in (None, "", [], "[]")]
    if len(given) > 1:
        raise RowProblem("has both tools and functions; expected one of them")
    if not given:
        return []
    key = given[0]
    value = parsed(key, raw[key]) if isinstance(raw[key], str) else raw[key]
    if not isinstance(value, list):
        raise RowProblem(
            f"{key}: is a {type(value).__name__}; expected a list of tools, or its JSON text"
        )
    return [_tool(f"{key}[{index}]", tool) for index, tool in enumerate(value)]


def _require_read(where: str, value: RawFields, read: frozenset[str]) -> None:
    """Raise RowProblem for a key that has a value and would be lost."""
    for key in value.keys() - read:
        if value[key] not in (None, "", [], {}):
            raise RowProblem(
                f"{where}: the key {shown(key)} ({shown(value[key])[:60]}) is not read and would "
                "be lost; expected id, name and arguments"
            )


def _tool(where: str, tool: Any) -> Tool:
    if isinstance(tool, str):
        tool = parsed(where, tool)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise RowProblem(
            f"{where}: has no name; expected an object with name, description and parameters"
        )
    if tool.get("type") not in (None, "function"):
        raise RowProblem(f"{where}: type {shown(tool['type'])}; expected 'function'")
    require_json(where, tool)
    checked: Any = tool
    if "function" not in tool:
        function = {key: tool[key] for key in tool if key != "type"}
        checked = {"type": "function", "function": function}
    return checked


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def tool_calls(where: str, turn: RawFields) -> list[ToolCall]:
    """Return the tool calls of a turn, or [] if it has none. Raises RowProblem.

    A turn has them as OpenAI's list, as its older `function_call`, or as the JSON text of either.
    """
    given = [
        key for key in ("tool_calls", "function_call") if turn.get(key) not in (None, [], "", {})
    ]
    if len(given) > 1:
        raise RowProblem(f"{where}: has both tool_calls and function_call; expected one of them")
    if not given:
        return []
    where, value = f"{where}.{given[0]}", turn[given[0]]
    if isinstance(value, str):
        value = parsed(where, value)
    calls = value if isinstance(value, list) else [value]
    return [_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def _call(where: str, call: Any) -> ToolCall:
    expected = "expected an object with name and arguments"
    if not isinstance(call, dict):
        raise RowProblem(f"{where}: is a {type(call).__name__}; {expected}")
    if call.get("type") not in (None, "function"):
        raise RowProblem(f"{where}: type {shown(call['type'])}; expected 'function'")
    function = call["function"] if call.get("function") is not None else call
    if not isinstance(function, dict):
        raise RowProblem(f"{where}.function: is a {type(function).__name__}; {expected}")
    _require_read(where, call, CALL_KEYS if function is not call else CALL_KEYS | FUNCTION_KEYS)
    _require_read(f"{where}.function", function, CALL_KEYS | FUNCTION_KEYS)
    given = [key for key in ARGUMENTS if function.get(key) is not None]
    if len(given) > 1:
        raise RowProblem(f"{where}: has {' and '.join(given)}; expected one of them")
    arguments = _arguments(where, function[given[0]] if given else None)
    checked: ToolCall = {
        "type": "function",
        "function": {"name": word(f"{where}.name", function.get("name")), "arguments": arguments},
    }
    if call.get("id") is None:
        return checked
    return {"id": word(f"{where}.id", call["id"]), **checked}


def _arguments(where: str, arguments: Any) -> JsonObject:
    if isinstance(arguments, str):
        # Some servers write no text for a call without arguments.
        arguments = parsed(f"{where}.arguments", arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        found = "missing" if arguments is None else f"a {type(arguments).__name__}"
        raise RowProblem(
            f"{where}: arguments is {found}; expected an object, or its JSON text ({{}} for none)"
        )
    require_json(f"{where}.arguments", arguments)
    return arguments
