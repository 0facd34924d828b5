"""Tool calls: the forms in which templates want them, and the proof that a rendered text holds exactly the calls of a turn.

Templates write calls as JSON, or in a syntax of their own (`<parameter=city>`, `city="Bonn"`). Either way the name and
every argument must be found again. A Python repr (`{'city': 'Bonn'}`) is refused, but for calls that are Python as a whole.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

NEAR = 80  # characters of the template's own syntax between an argument's name and its value


@dataclass(frozen=True)
class CallForm:
    """How a template takes calls: arguments as an object or as JSON text; without ids, or with ids it can use."""

    text_arguments: bool = False
    ids: Literal["own", "short"] = "own"


FORMS = [CallForm(text, ids) for ids in ("own", "short") for text in (False, True)]


def shaped(messages: Sequence[Mapping[str, Any]], form: CallForm) -> list[dict[str, Any]]:
    """Return the messages with their calls in `form`.

    `short` numbers the calls with nine letters and digits, which is what Mistral's templates insist on, and gives the
    tool turns that follow the same ids, in order.
    """
    result, open_ids = [], []
    for index, message in enumerate(messages):
        turn = dict(message)
        if calls := turn.get("tool_calls"):
            turn["tool_calls"] = [
                _shaped_call(call, f"call{index % 1000:03d}{number % 100:02d}", form)
                for number, call in enumerate(calls)
            ]
            open_ids = [call.get("id") for call in turn["tool_calls"]]
        elif turn["role"] == "tool" and form.ids == "short" and open_ids:
            turn["tool_call_id"] = open_ids.pop(0)
        result.append(turn)
    return result


def _shaped_call(call: Mapping[str, Any], number: str, form: CallForm) -> dict[str, Any]:
    function = dict(call["function"])
    if form.text_arguments and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function, **({"id": number} if form.ids == "short" else {})}


def arguments_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call as an object, in whichever form it is."""
    arguments = call["function"]["arguments"]
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def missing_calls(text: str, calls: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what of the calls `text` does not hold (None: nothing): the calls, in their order, and no call besides."""
    found = [value for value in _json_values(text) if isinstance(value, dict)]
    as_json = [
        [_is_call(value, call["function"]["name"], arguments_of(call)) for value in found]
        for call in calls
    ]
    if all(any(row) for row in as_json):
        names = {call["function"]["name"] for call in calls}
        written = sum(
            bool(names & {item for item in _parts(value).values() if isinstance(item, str)})
            for value in found
        )
        return None if written == len(calls) else f"{written} calls are written for {len(calls)}"
    starts, position = [], 0
    for call in calls:
        name = call["function"]["name"]
        position = text.find(name, position)
        if position < 0:
            return f"the tool call {name} is missing"
        starts.append(position)
        position += len(name)
    for call, begin, end in zip(calls, starts, [*starts[1:], len(text)], strict=True):
        name, arguments = call["function"]["name"], arguments_of(call)
        part = text[begin + len(name) : end]
        if any(value == arguments for value in _json_values(part)):
            continue
        if _python_call(text[begin:end], name) == arguments:
            continue
        for value in (
            arguments,
            *(value for value in arguments.values() if isinstance(value, dict | list)),
        ):
            if (
                value
                and str(value) in part
                and str(value) not in (json.dumps(value), json.dumps(value, ensure_ascii=False))
            ):
                return f"arguments of {name} are written as a Python repr, {str(value)[:60]},"
        lost = next(
            (key for key, value in arguments.items() if not _argument_in(part, key, value)), None
        )
        if lost is not None:
            return f"argument {lost} of {name} ({json.dumps(arguments[lost], ensure_ascii=False)[:60]}) is missing or changed"
    return None


def _json_values(text: str) -> Iterator[Any]:
    """Yield each JSON object or array in a text, and the objects within those, outermost first."""
    decoder, position = json.JSONDecoder(), 0
    while (match := re.compile(r"[{\[]").search(text, position)) is not None:
        try:
            value, position = decoder.raw_decode(text, match.start())
        except ValueError:
            position = match.start() + 1
            continue
        yield value
        if isinstance(value, list):
            yield from (item for item in value if isinstance(item, dict))


def _python_call(text: str, name: str) -> Any:
    """Return the arguments of a call that is written as in Python, name(city="Bonn"); None if it is not."""
    if not text.startswith(f"{name}("):
        return None
    for end in (match.end() for match in re.finditer(r"\)", text)):
        try:
            call = ast.parse(text[:end], mode="eval").body
            return (
                {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
                if isinstance(call, ast.Call)
                else None
            )
        except (SyntaxError, ValueError):
            continue
    return None


def _parts(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's parts: of {"type": …, "function": {…}} those of the inner object."""
    inner = value.get("function")
    return dict(inner) if isinstance(inner, dict) else dict(value)


def _is_call(value: Mapping[str, Any], name: str, arguments: Mapping[str, Any]) -> bool:
    parts = _parts(value)
    if name not in [item for item in parts.values() if isinstance(item, str)]:
        return False
    return any(
        item == arguments or (isinstance(item, str) and _parsed(item) == arguments)
        for item in parts.values()
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _argument_in(text: str, key: str, value: Any) -> bool:
    """Return whether the value stands shortly after its name, as JSON, as bare text, or as the words of a scalar."""
    for match in re.finditer(rf"(?<!\w){re.escape(key)}(?!\w)", text):
        after = text[match.end() :]
        if isinstance(value, dict | list):
            begin = min((at for at in (after.find("{"), after.find("[")) if at >= 0), default=-1)
            if 0 <= begin <= NEAR and any(found == value for found in _json_values(after[begin:])):
                return True
            if _leaves_in(after, value):
                return True
        elif any(_stands(after, form) for form in _written(value)):
            return True
    return False


def _leaves_in(text: str, value: Any) -> bool:
    """Return whether the keys and scalars of a list or object stand in order, each shortly after the one before: as tags."""
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
        return False  # a quoted text that its own quotes or line breaks cut short
    cut_before = begin > 0 and form[:1].isalnum() and text[begin - 1].isalnum()
    cut_after = (
        end < len(text)
        and form[-1:].isalnum()
        and (text[end].isalnum() or text[end : end + 2].strip(".") != text[end : end + 2])
    )
    return not cut_before and not cut_after


def _written(value: Any) -> list[str]:
    if isinstance(value, str):
        return (
            [
                value,
                *(json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)),
            ]
            if value
            else ['""', "''", "><", ">\n"]
        )
    return [json.dumps(value), str(value)]
