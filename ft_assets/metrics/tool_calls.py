"""Metrics of an answer that calls tools: the names, the arguments, and the order of the calls.

Calls are read from the text of answer and reference in the forms that templates write: JSON
(Hermes, Qwen, Llama 3, Mistral), a name before JSON (later Mistral), Python calls (Llama 4, LFM2),
and tags (Qwen3-Coder, GLM). Whether a model's own form can be read is checked on the references
before training, see `unread_calls`. Text around JSON and tags does not count.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ft_assets.metrics.json_object import json_values, parse_json
from ft_assets.metrics.registry import Metric
from ft_assets.metrics.values import Values
from ft_assets.rows.types import FunctionCall, Json, ToolCall

# What an answer has that begins a call. If no call can be read, it is a broken one.
OPENING = re.compile(r"<tool_call>|<function=|\[TOOL_CALLS\]|\"(?:arguments|parameters)\"\s*:")
# Two syntaxes of tags: a call with its name and body, and an argument with its key and value.
TAGS = [
    (
        re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL),
        re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL),
    ),
    (
        re.compile(r"<tool_call>\s*([^<{\s]+)\s*(<arg_key>.*?)?</tool_call>", re.DOTALL),
        re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL),
    ),
]
NAME = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(?=\{)")
DECODER = json.JSONDecoder()
ORDERED = "ordered"

Calls = Sequence[FunctionCall]
Same = Callable[[FunctionCall, FunctionCall], bool]


@Metric("tool_calls", binary=True, config="tool_calls", values=True)
def tool_calls(
    answers: list[str], references: list[str], order: str, values: Values
) -> list[float]:
    """Score 1 if the answer has exactly the reference's calls, with equal arguments."""
    return _exactly(answers, references, order, _same_call(values))


@Metric("tool_names", binary=True, config="tool_calls")
def tool_names(answers: list[str], references: list[str], order: str) -> list[float]:
    """Score 1 if the answer calls the functions of the reference, whatever the arguments."""
    return _exactly(answers, references, order, lambda one, other: one["name"] == other["name"])


@Metric("tool_call_f1", config="tool_calls", values=True)
def tool_call_f1(
    answers: list[str], references: list[str], order: str, values: Values
) -> list[float]:
    """Score 2·right / (calls given + calls expected); 1 if neither has a call."""
    scores = []
    for given, expected in _read(answers, references):
        if given is None:
            scores.append(0.0)
            continue
        right = _right(given, expected, order, _same_call(values))
        calls = len(given) + len(expected)
        scores.append(2 * right / calls if calls else 1.0)
    return scores


def parse_calls(text: str) -> list[FunctionCall] | None:
    """Return the calls of a text in their order; None if it begins a call that cannot be read."""
    for form in (_tagged, _named, _python, _json):
        calls = form(text)
        if calls:
            return calls
    return None if OPENING.search(text) else []


def unread_calls(text: str, calls: Sequence[ToolCall]) -> str | None:
    """Return the difference of the calls of a row from those in its text, or None."""
    found = parse_calls(text)
    if not found:
        return "no call can be read from it"
    if len(found) != len(calls):
        return f"{len(found)} calls can be read from it, not {len(calls)}"
    for given, call in zip(found, calls, strict=True):
        wanted = call["function"]
        if given["name"] != wanted["name"]:
            return f"the call {given['name']} is read from it, not {wanted['name']}"
        same = given["arguments"].keys() == wanted["arguments"].keys() and all(
            _same_or_text(value, wanted["arguments"][key])
            for key, value in given["arguments"].items()
        )
        if not same:
            return f"other arguments of {wanted['name']} are read from it"
    return None


def _same_or_text(read: Json, value: Json) -> bool:
    """Return True if a value was read, or its text: a tag does not tell "5" from 5."""
    return Values().same_json(read, value) or (isinstance(value, str) and str(read) == value)


def _exactly(answers: list[str], references: list[str], order: str, same: Same) -> list[float]:
    return [
        float(
            given is not None
            and len(given) == len(expected)
            and _right(given, expected, order, same) == len(expected)
        )
        for given, expected in _read(answers, references)
    ]


def _read(answers: list[str], references: list[str]) -> Iterator[tuple[Calls | None, Calls]]:
    for answer, reference in zip(answers, references, strict=True):
        yield parse_calls(answer), parse_calls(reference) or []


def _same_call(values: Values) -> Same:
    def same(given: FunctionCall, expected: FunctionCall) -> bool:
        name = expected["name"]
        return given["name"] == name and values.same_json(
            given["arguments"], expected["arguments"], name
        )

    return same


def _right(given: Calls, expected: Calls, order: str, same: Same) -> int:
    """Return the number of right calls: at the same place, or each with one of the others."""
    if order == ORDERED:
        return sum(map(same, given, expected))
    left = list(expected)
    for call in given:
        match = next((place for place, one in enumerate(left) if same(call, one)), None)
        if match is not None:
            del left[match]
    return len(expected) - len(left)


def _json(text: str) -> list[FunctionCall]:
    """Read {"name": …, "arguments": {…}}, also as "parameters" or within {"function": …}."""
    found = [value for value in json_values(text) if isinstance(value, dict)]
    return [call for value in found if (call := _json_call(value)) is not None]


def _json_call(value: dict[str, Any]) -> FunctionCall | None:
    inner = value.get("function")
    parts = inner if isinstance(inner, dict) else value
    name = parts.get("name", inner)
    arguments = parts.get("arguments", parts.get("parameters"))
    if isinstance(arguments, str):
        arguments = parse_json(arguments)[1]
    if isinstance(name, str) and isinstance(arguments, dict):
        return {"name": name, "arguments": arguments}
    return None


def _tagged(text: str) -> list[FunctionCall]:
    """Read tags, e.g. <function=name><parameter=key>value</parameter></function>.

    A value is JSON, or else text.
    """
    calls: list[FunctionCall] = []
    for function, argument in TAGS:
        for name, body in function.findall(text):
            pairs = {key: (*parse_json(value), value) for key, value in argument.findall(body)}
            arguments: dict[str, Json] = {
                key: parsed if is_json else value for key, (is_json, parsed, value) in pairs.items()
            }
            calls.append({"name": name, "arguments": arguments})
    return calls


def _named(text: str) -> list[FunctionCall]:
    """Read name{…}, or several of them, if that is the whole text."""
    calls: list[FunctionCall] = []
    position, text = 0, text.strip()
    while position < len(text):
        name = NAME.match(text, position)
        try:
            value, position = DECODER.raw_decode(text, name.end()) if name else (None, 0)
        except (ValueError, RecursionError):
            return []
        if name is None or not isinstance(value, dict):
            return []
        calls.append({"name": name[1], "arguments": value})
    return calls


def _python(text: str) -> list[FunctionCall]:
    """Read name(key=value), or a list of such calls, if that is the whole text."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []


def _python_call(node: ast.expr) -> FunctionCall:
    """Return the call of an expression. Raises ValueError if it is none with names alone."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with named arguments")
    arguments = {str(one.arg): ast.literal_eval(one.value) for one in node.keywords}
    # Through JSON: a tuple becomes a list, and what JSON cannot hold is a TypeError.
    return {"name": ast.unparse(node.func), "arguments": json.loads(json.dumps(arguments))}
