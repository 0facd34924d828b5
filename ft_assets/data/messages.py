"""Turns of a conversation: every spelling of a turn, its tool calls and the row's tools, checked one by one and in order.

A checked turn is {"role": system|user|assistant|tool|text, "content"} and only where given `train` (False: an answer that
is context only), `tool_calls` [{"id"?, "type": "function", "function": {"name", "arguments"}}], `tool_call_id`, `name`.
"""

import json
from typing import Any

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(
        (
            "assistant",
            "gpt",
            "model",
            "bot",
            "chatbot",
            "chatgpt",
            "bard",
            "output",
            "response",
            "answer",
        ),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "tool_response", "tool_result"), "tool"
    ),
}
CALLS = (
    "function_call",
    "tool_call",
    "tool_calls",
)  # roles of a turn that is nothing but calls, in ShareGPT's spelling
NAMES = (("role", "from"), ("content", "value"))
REASONING = ("reasoning_content", "reasoning", "thinking")
SHOWN = 600  # characters of a problem: a row can have keys of any length


class RowProblem(Exception):
    """Why a row cannot be used; text that can be stored whatever the row holds."""

    def __init__(self, problem: str) -> None:
        problem = problem if len(problem) <= SHOWN else f"{problem[:SHOWN]}…"
        super().__init__(problem.encode("utf-8", "backslashreplace").decode())


def shown(value: Any) -> str:
    """Return a value for a message; one that is nested too deeply by its type."""
    try:
        return repr(value)
    except RecursionError:
        return f"a {type(value).__name__}"


def spelled(turn: Any) -> Any:
    """Return a turn under our names for keys and roles, its texts joined; what it is not is said by `checked`."""
    if not isinstance(turn, dict):
        return turn
    role, content = (
        turn.get(ours) if turn.get(ours) is not None else turn.get(theirs) for ours, theirs in NAMES
    )
    if isinstance(content, list) and content and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if isinstance(role, str) and role.lower() in CALLS:
        return {**turn, "role": "assistant", "content": None, "tool_calls": content}
    return {
        **turn,
        "role": ROLES.get(role.lower(), role) if isinstance(role, str) else role,
        "content": content,
    }


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def checked(name: str, turns: list[Any]) -> list[dict[str, Any]]:
    """Return turns that are right each and in their order. Raises RowProblem with the index of the first wrong one."""
    if not turns:
        raise RowProblem(f"{name}: is empty")
    done = [_turn(f"{name}[{index}]", spelled(turn)) for index, turn in enumerate(turns)]
    expected, calls, results = "user", [], 0
    for index, turn in enumerate(done):
        where, role = f"{name}[{index}]", turn["role"]
        if role == "system":
            if index:
                raise RowProblem(f"{where}: a system turn; expected it first or not at all")
        elif role == "tool":
            if results == len(calls):
                many = (
                    f"the calls before it are {len(calls)} and have their results"
                    if calls
                    else "no assistant turn with tool calls before it"
                )
                raise RowProblem(f"{where}: a tool result; {many}")
            _answers(where, turn, calls, done[index - results : index])
            results += 1
            expected = "assistant" if results == len(calls) else "tool"
        elif role != expected:
            raise RowProblem(
                f"{where}: role {shown(role)}; expected {_expectation(expected, len(calls), results)}"
            )
        elif role == "user":
            expected, calls, results = "assistant", [], 0
        else:
            calls, results = turn.get("tool_calls", []), 0
            expected = "tool" if calls else "user"
    if done[-1]["role"] == "system":
        raise RowProblem(f"{name}: only a system turn; expected a user turn")
    if done[-1]["role"] == "tool" and results < len(calls):
        raise RowProblem(
            f"{name}[{len(done) - 1}]: {results} results; expected {len(calls)}, one a call"
        )
    return done


def text(where: str, value: Any, empty: bool = False) -> str:
    """Return a text that can be trained on. Raises RowProblem."""
    if not isinstance(value, str):
        raise RowProblem(
            f"{where}: content is {'missing' if value is None else f'a {type(value).__name__}'}; expected text"
        )
    if not value.strip() and not empty:
        raise RowProblem(f"{where}: empty content")
    if "\x00" in value:
        raise RowProblem(f"{where}: holds a NUL character; expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem(f"{where}: holds half of a surrogate pair; expected text") from None
    return value


def tools(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tools of a row, {"type": "function", "function": {"name", …}} each; none: []. Raises RowProblem."""
    given = [key for key in ("tools", "functions") if raw.get(key) not in (None, "", [], "[]")]
    if len(given) > 1:
        raise RowProblem("has both tools and functions; expected one of them")
    if not given:
        return []
    key = given[0]
    value = _json(key, raw[key]) if isinstance(raw[key], str) else raw[key]
    if not isinstance(value, list):
        raise RowProblem(
            f"{key}: is a {type(value).__name__}; expected a list of tools, or its JSON text"
        )
    return [_tool(f"{key}[{index}]", tool) for index, tool in enumerate(value)]


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _json(where, tool)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or not function["name"].strip()
    ):
        raise RowProblem(
            f"{where}: has no name; expected an object with name, description and parameters"
        )
    if tool.get("type") not in (None, "function"):
        raise RowProblem(f"{where}: type {shown(tool['type'])}; expected 'function'")
    _storable(where, tool)
    return (
        tool
        if "function" in tool
        else {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
    )


def _expectation(expected: str, calls: int, results: int) -> str:
    if expected == "tool":
        return f"the tool's result ({results} of {calls} are there)"
    return f"{expected!r} (turns alternate)"


def _answers(
    where: str, turn: dict[str, Any], calls: list[dict[str, Any]], before: list[dict[str, Any]]
) -> None:
    """Raise RowProblem unless a tool's result belongs to one of the calls that have none yet."""
    if (given := turn.get("tool_call_id")) is not None:
        if given not in (known := [call["id"] for call in calls if "id" in call]):
            raise RowProblem(
                f"{where}: tool_call_id {given!r}; expected one of the calls' ids: {', '.join(known) or '(they have none)'}"
            )
        if given in [other.get("tool_call_id") for other in before]:
            raise RowProblem(f"{where}: tool_call_id {given!r} has its result already")
    called = [
        call["function"]["name"] for call in calls if given is None or call.get("id") == given
    ]
    if "name" in turn and turn["name"] not in called:
        raise RowProblem(
            f"{where}: is the result of {turn['name']!r}; expected {' or '.join(map(repr, called))}, which was called"
        )


def _turn(where: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowProblem(
            f"{where}: is a {type(turn).__name__}; expected an object with role and content"
        )
    role = turn.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        raise RowProblem(
            f"{where}: role {shown(role)}; expected one of system, user, assistant, tool (or human, gpt, …)"
        )
    if hidden := next((key for key in REASONING if turn.get(key)), None):
        raise RowProblem(
            f"{where}: {hidden} would be lost; write it into content as the model's template does, or remove the key"
        )
    calls = _calls(where, turn)
    if calls and role != "assistant":
        raise RowProblem(
            f"{where}: the {role}'s turn has tool calls; expected them on an assistant turn"
        )
    content = turn.get("content")
    done: dict[str, Any] = {
        "role": role,
        "content": text(where, "" if calls and content is None else content, empty=bool(calls)),
    }
    if not _trained(where, turn, role):
        done["train"] = False
    if calls:
        done["tool_calls"] = calls
    if role == "tool":
        done |= {
            key: _word(f"{where}.{key}", turn[key])
            for key in ("tool_call_id", "name")
            if turn.get(key) is not None
        }
    return done


def _trained(where: str, turn: dict[str, Any], role: str) -> bool:
    """Return False for an assistant turn that is only context: `train: false`, or OpenAI's `weight: 0`."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowProblem(f"{where}: train is {shown(train)}; expected true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowProblem(f"{where}: weight is {shown(weight)}; expected 0 or 1")
    if train is not None and weight is not None and train != bool(weight):
        raise RowProblem(f"{where}: train is {train} and weight is {weight}; expected one of them")
    given = train if train is not None else None if weight is None else bool(weight)
    if given and role != "assistant":
        raise RowProblem(
            f"{where}: the {role}'s turn is to be trained; only the assistant's answers are"
        )
    return role != "assistant" or given is not False


def _calls(where: str, turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tool calls of a turn in one spelling: OpenAI's list, its older `function_call`, JSON text of either."""
    given = [
        key for key in ("tool_calls", "function_call") if turn.get(key) not in (None, [], "", {})
    ]
    if len(given) > 1:
        raise RowProblem(f"{where}: has both tool_calls and function_call; expected one of them")
    if not given:
        return []
    where, value = f"{where}.{given[0]}", turn[given[0]]
    if isinstance(value, str):
        value = _json(where, value)
    return [
        _call(f"{where}[{index}]", call)
        for index, call in enumerate(value if isinstance(value, list) else [value])
    ]


def _call(where: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RowProblem(
            f"{where}: is a {type(call).__name__}; expected an object with name and arguments"
        )
    if call.get("type") not in (None, "function"):
        raise RowProblem(f"{where}: type {shown(call['type'])}; expected 'function'")
    function = call["function"] if call.get("function") is not None else call
    if not isinstance(function, dict):
        raise RowProblem(
            f"{where}.function: is a {type(function).__name__}; expected an object with name and arguments"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(f"{where}.arguments", arguments)
    if not isinstance(arguments, dict):
        found = "missing" if arguments is None else f"a {type(arguments).__name__}"
        raise RowProblem(
            f"{where}: arguments is {found}; expected an object, or its JSON text ({{}} for none)"
        )
    _storable(f"{where}.arguments", arguments)
    done = {
        "type": "function",
        "function": {"name": _word(f"{where}.name", function.get("name")), "arguments": arguments},
    }
    return done if call.get("id") is None else {"id": _word(f"{where}.id", call["id"]), **done}


def _word(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowProblem(
            f"{where}: is {'missing' if value is None else f'a {type(value).__name__}'}; expected a name"
        )
    return text(where, value)


def _json(where: str, value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"{where}: is not JSON ({error})") from None


def _storable(where: str, value: Any) -> None:
    """Raise RowProblem for what JSON cannot hold: NaN, dates and bytes of a table, half of a surrogate pair."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False, sort_keys=True).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise RowProblem(f"{where}: holds what JSON cannot ({error})") from None
