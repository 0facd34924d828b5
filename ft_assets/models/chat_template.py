"""Bake settings into the text of a chat template, and read properties of the template.

Settings are baked in as Jinja lines before the template, so that training, evaluation and the
served model all render alike.
Not here: rendering conversations (chat/rendering.py), and the source of templates (snapshot.py).
"""

import copy
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from ft_assets.rows.types import Message

FROZEN_DATE = date(2025, 1, 1)
DATE_KEY = "chat_date"  # in tokenizer_config.json of a snapshot
CONTROL_KEY = "chat_control_tokens"  # there too: "text" if control tokens in texts are escaped
CUT = "\ufdd0"  # escapes them; Unicode has no character here, so no text has it
FOLD = (
    "{%- if messages and messages[0]['role'] == 'system' %}"
    "{%- if messages[1:] and messages[1]['role'] == 'user' %}"
    "{%- set messages = [dict(messages[1], content=messages[0]['content'] + '\\n\\n' + "
    "messages[1]['content'])] + messages[2:] %}"
    "{%- else %}{%- set messages = [dict(messages[0], role='user')] + messages[1:] %}{%- endif %}"
    "{%- endif %}\n"
)
MARKER = re.compile(r"<\|[^|<>\s{}]+\|>|<｜[^｜<>\s{}]+｜>|<(?:start|end)_of_\w+>")
# The variables of templates that switch thinking, and their values: without and with it.
SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "reasoning_effort": ("none", "high"),
}
QUESTION, ANSWER = "zqquestion", "zqanswer"
DATE_CODES = ["-d", "-m", "-H", "-I", "-j", *"aAbBcdDeFHIjmMpSTuUwWxXyYZ"]


def bake(template: str, kwargs: Mapping[str, Any], system_turn: str) -> str:
    """Return the template with `kwargs` set.

    If `system_turn` is user, the system turn is put into the first user turn. The environment in
    which chat templates run cuts the newline after a block, so the template's text is unchanged.
    """
    lines = [f"{{%- set {name} = {_literal(value)} %}}\n" for name, value in sorted(kwargs.items())]
    return "".join(lines) + (FOLD if system_turn == "user" else "") + template


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        items = (f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the system turn's text before that of the first user turn.

    `bake` does the same in Jinja.
    """
    turns = [turn.copy() for turn in messages]
    if not turns or turns[0]["role"] != "system":
        return turns
    if len(turns) > 1 and turns[1]["role"] == "user":
        system, *turns = turns
        turns[0]["content"] = system["content"] + "\n\n" + turns[0]["content"]
    else:
        turns[0]["role"] = "user"
    return turns


def reads(template: str, name: str) -> bool:
    """Return True if a template mentions a variable."""
    return re.search(rf"(?<![\w.'\"]){re.escape(name)}(?![\w'\"])", template) is not None


def switches(template: str, thinking: bool) -> list[dict[str, Any]]:
    """Return the settings that may switch a template's thinking, the likely ones first."""
    values = [
        ({name: both[thinking]}, {name: both[not thinking]})
        for name, both in SWITCHES.items()
        if reads(template, name)
    ]
    return [setting for column in zip(*values, strict=True) for setting in column]


def with_template(tokenizer: Any, template: str) -> Any:
    """Return a tokenizer with another template; the vocabulary is shared."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def prints_date(tokenizer: Any) -> bool:
    """Return True if the template can print today's date."""
    return reads(tokenizer.chat_template or "", "strftime_now")


@functools.cache
def frozen(template: str, day: date) -> str:
    """Return the template with a `strftime_now` that prints `day` on every day.

    A template without dates is unchanged. The function is a macro in Jinja, because transformers
    passes no functions to templates. It is for rendering only and never saved: the served model
    prints the true date.
    """
    if not reads(template, "strftime_now"):
        return template
    moment = datetime.combine(day, time())
    filters = "".join(
        f" | replace('%{code}', {_literal(moment.strftime('%' + code))})" for code in DATE_CODES
    )
    return f"{{%- macro strftime_now(form) -%}}{{{{ form{filters} }}}}{{%- endmacro %}}\n{template}"


def date_of(tokenizer: Any) -> date:
    """Return the date that a snapshot's templates print."""
    written = tokenizer.init_kwargs.get(DATE_KEY)
    return date.fromisoformat(written) if written else FROZEN_DATE


def broken_markers(template: str, tokenizer: Any) -> dict[str, int]:
    """Return {marker: tokens} of a template's special markers that are not one known token."""
    lengths = {
        marker: len(tokenizer.encode(marker, add_special_tokens=False))
        for marker in sorted(set(MARKER.findall(template)))
    }
    unknown = tokenizer.unk_token_id
    return {
        marker: length
        for marker, length in lengths.items()
        if length != 1
        or (unknown is not None and tokenizer.convert_tokens_to_ids(marker) == unknown)
    }


def end_of_turn(tokenizer: Any, known: Collection[int] = ()) -> int | None:
    """Return the added token that ends an answer, if the template writes no `known` stop token.

    It is the first token after the answer that the template does not also write between the context
    and the answer. Return None if the template refuses a question and an answer, or writes no such
    token.
    """
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    template = frozen(tokenizer.chat_template, FROZEN_DATE)
    try:
        context = tokenizer.apply_chat_template(
            turns[:1], chat_template=template, add_generation_prompt=True, tokenize=False
        )
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except Exception:  # templates raise anything; the proofs of the rows report it
        return None
    before, found, after = text.rpartition(ANSWER)
    if not found:
        return None
    opened = set(
        tokenizer.encode(
            before[len(context) :] if before.startswith(context) else "", add_special_tokens=False
        )
    )
    ends = [
        token
        for token in tokenizer.encode(after, add_special_tokens=False)
        if token in tokenizer.added_tokens_decoder
    ]
    if any(token in known for token in ends):
        return None
    return next((token for token in ends if token not in opened), None)
