"""Give tool calls the form that a template takes, and prove that a text has exactly a turn's calls.

Templates write calls as JSON or in a syntax of their own (`<parameter=city>`, `city="Bonn"`). In
both, the name and every argument must be found again. A Python repr (`{'city': 'Bonn'}`) is
refused, except in calls that are Python as a whole.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ft_assets.metrics.json_object import json_values
from ft_assets.rows.types import Json, JsonObject, Message, ToolCall

TAGGED = re.compile(r">(\s*[\[{][^<>]*[\]}]\s*)<")  # a list or an object alone between two tags
NEAR = 80  # characters of the template's own syntax between an argument's name and its value


@dataclass(frozen=True)
class CallForm:
    """The form of calls: arguments as an object or as JSON text, own or short ids."""

    text_arguments: bool = False
    ids: Literal["own", "short"] = "own"


FORMS = [CallForm(text, ids) for ids in ("own", "short") for text in (False, True)]


def shaped(messages: Sequence[Message], form: CallForm) -> list[Message]:
    """Return the messages with their calls in `form`.

    The ids `short` have nine letters and digits, as Mistral's templates require. The tool turns
    that follow the calls get the same ids, in order.
    """
    result: list[Message] = []
    open_ids: list[str] = []
    for index, message in enumerate(messages):
        turn = message.copy()
        if calls := turn.get("tool_calls"):
            turn["tool_calls"] = [
                _shaped_call(call, f"call{index % 1000:03d}{number % 100:02d}", form)
                for number, call in enumerate(calls)
            ]
            open_ids = [call["id"] for call in turn["tool_calls"] if "id" in call]
        elif turn["role"] == "tool" and form.ids == "short" and open_ids:
            turn["tool_call_id"] = open_ids.pop(0)
        result.append(turn)
    return result


def _shaped_call(call: ToolCall, number: str, form: CallForm) -> ToolCall:
    function: Any = call["function"].copy()
    if form.text_arguments and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    formed = call.copy()
    formed["function"] = function
    if form.ids == "short":
        formed["id"] = number
    return formed


def arguments_of(call: ToolCall) -> JsonObject:
    """Return the arguments of a call as an object, also if the call has them as JSON text."""
    arguments: Any = call["function"]["arguments"]
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def missing_calls(text: str, calls: Sequence[ToolCall]) -> str | None:
    """Return a description of the first call that `text` does not have.

    Return None if the text has exactly these calls, in order.
    """
    found = [value for value in json_values(text) if isinstance(value, dict)]
    if all(any(_is_call(value, call) for value in found) for call in calls):
        names = {call["function"]["name"] for call in calls}
        written = sum(bool(names & _texts(value)) for value in found)
        return None if written == len(calls) else f"{written} calls are written for {len(calls)}"
    starts: list[int] = []
    position = 0
    for call in calls:
        name = call["function"]["name"]
        position = text.find(name, position)
        if position < 0:
            return f"the tool call {name} is missing"
        starts.append(position)
        position += len(name)
    for call, begin, end in zip(calls, starts, [*starts[1:], len(text)], strict=True):
        lost = _lost_arguments(text[begin:end], call)
        if lost is not None:
            return lost
    return None


def _lost_arguments(text: str, call: ToolCall) -> str | None:
    """Return a description of the first argument that the text of a call does not have."""
    name, arguments = call["function"]["name"], arguments_of(call)
    part = text[len(name) :]
    if any(value == arguments for value in json_values(part)):
        return None
    if _python_call(text, name) == arguments:
        return None
    if part.startswith("(") and (cut := _cut_by_line(part, arguments)):
        return f"argument {cut} of {name} has a line break within quotes, which ends the call,"
    tagged = list(_tagged_literals(part))
    for value in (arguments, *(value for value in arguments.values() if value not in tagged)):
        if isinstance(value, dict | list) and value and _is_repr_in(part, value):
            return f"arguments of {name} are written as a Python repr, {str(value)[:60]},"
    for key, value in arguments.items():
        if not _argument_in(part, key, value):
            shown = json.dumps(value, ensure_ascii=False)[:60]
            return f"argument {key} of {name} ({shown}) is missing or changed"
    return None


def _is_repr_in(text: str, value: Json) -> bool:
    """Return True if a text has a value as a Python repr that is not also its JSON."""
    as_json = (json.dumps(value), json.dumps(value, ensure_ascii=False))
    return str(value) in text and str(value) not in as_json


def _tagged_literals(text: str) -> Iterator[Any]:
    """Yield each list or object that is alone in a tag as a Python literal, as in Seed-OSS.

    Python reads the literal back; between tags it begins and ends nowhere else.
    """
    return (_literal(match[1]) for match in TAGGED.finditer(text))


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _cut_by_line(text: str, arguments: JsonObject) -> str | None:
    """Return the first argument whose line break is within quotes in a call in Python syntax."""
    for key, value in arguments.items():
        if isinstance(value, str) and "\n" in value and re.search(rf"{re.escape(key)}=['\"]", text):
            return key
    return None


def _python_call(text: str, name: str) -> Any:
    """Return the arguments of a call in Python syntax, name(city="Bonn"), or None."""
    if not text.startswith(f"{name}("):
        return None
    for end in (match.end() for match in re.finditer(r"\)", text)):
        try:
            call = ast.parse(text[:end], mode="eval").body
            if not isinstance(call, ast.Call):
                return None
            return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        except (SyntaxError, ValueError):
            continue
    return None


def _parts(value: JsonObject) -> JsonObject:
    """Return the parts of a call: the inner object of {"type": …, "function": {…}}."""
    inner = value.get("function")
    return inner if isinstance(inner, dict) else value


def _texts(value: JsonObject) -> set[str]:
    return {item for item in _parts(value).values() if isinstance(item, str)}


def _is_call(value: JsonObject, call: ToolCall) -> bool:
    if call["function"]["name"] not in _texts(value):
        return False
    arguments = arguments_of(call)
    return any(
        item == arguments or (isinstance(item, str) and _parsed(item) == arguments)
        for item in _parts(value).values()
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _argument_in(text: str, key: str, value: Any) -> bool:
    """Return True if a value is shortly after its name: as JSON, bare text, or a scalar's word."""
    for match in re.finditer(rf"(?<!\w)(?<!</){re.escape(key)}(?!\w)", text):
        after = text[match.end() :]
        if isinstance(value, dict | list):
            tagged = next(_tagged_literals(after[: NEAR + len(str(value))]), None)
            if tagged is not None:
                if tagged == value:
                    return True
                continue
            begin = min((at for at in (after.find("{"), after.find("[")) if at >= 0), default=-1)
            if 0 <= begin <= NEAR and any(found == value for found in json_values(after[begin:])):
                return True
            if _leaves_in(after, value):
                return True
        elif any(_stands(after, form) for form in _written(value)):
            return True
    return False


def _leaves_in(text: str, value: Any) -> bool:
    """Return True if the keys and scalars of a list or object follow closely, as tags."""
    for leaf in _leaves(value):
        form = next((form for form in _written(leaf) if _stands(text, form)), None)
        if form is None:
            return False
        text = text[text.find(form) + len(form) :]
    return bool(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _stands(text: str, form: str) -> bool:
    begin = text.find(form)
    if not 0 <= begin <= NEAR:
        return False
    end = begin + len(form)
    quote = text[begin - 1 : begin]
    if (
        quote in ("'", '"')
        and text[end : end + 1] == quote
        and (quote in form.replace(f"\\{quote}", "") or "\n" in form)
    ):
        return False  # its own quotes or line breaks cut a quoted text short
    cut_before = begin > 0 and form[:1].isalnum() and text[begin - 1].isalnum()
    cut_after = (
        end < len(text)
        and form[-1:].isalnum()
        and (text[end].isalnum() or text[end : end + 2].strip(".") != text[end : end + 2])
    )
    return not cut_before and not cut_after


def _written(value: Any) -> list[str]:
    if not isinstance(value, str):
        return [json.dumps(value), str(value)]
    if not value:
        return ['""', "''", "><", ">\n"]
    return [value, *(json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]
