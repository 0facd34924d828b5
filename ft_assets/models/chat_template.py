"""A chat template as text: what is baked into it for a snapshot, and what it says of itself.

Baked in are Jinja lines before the template, so that training, evaluation and the served model all render alike.
Not here: rendering conversations (rendering.py), and where templates come from (models/source.py).
"""

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

FROZEN_DATE = date(2025, 1, 1)
DATE_KEY = "chat_date"  # in tokenizer_config.json of a snapshot
FOLD = (
    "{%- if messages and messages[0]['role'] == 'system' %}"
    "{%- if messages[1:] and messages[1]['role'] == 'user' %}"
    "{%- set messages = [dict(messages[1], content=messages[0]['content'] + '\\n\\n' + messages[1]['content'])] + messages[2:] %}"
    "{%- else %}{%- set messages = [dict(messages[0], role='user')] + messages[1:] %}{%- endif %}"
    "{%- endif %}\n"
)
MARKER = re.compile(r"<\|[^|<>\s{}]+\|>|<｜[^｜<>\s{}]+｜>|<(?:start|end)_of_\w+>")
QUESTION, ANSWER = "zqquestion", "zqanswer"
DATE_CODES = ["-d", "-m", "-H", "-I", "-j", *"aAbBcdDeFHIjmMpSTuUwWxXyYZ"]


def bake(template: str, kwargs: Mapping[str, Any], system_turn: str) -> str:
    """Return the template with `kwargs` set, and the system turn put into the first user turn if `system_turn` is user.

    The newline after a block is cut by the environment in which chat templates run, so the text itself is unchanged.
    """
    lines = [f"{{%- set {name} = {_literal(value)} %}}\n" for name, value in sorted(kwargs.items())]
    return "".join(lines) + (FOLD if system_turn == "user" else "") + template


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def fold_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the system turn in front of the first user turn's text, as `bake` does it in Jinja."""
    turns = [dict(turn) for turn in messages]
    if not turns or turns[0]["role"] != "system":
        return turns
    if len(turns) > 1 and turns[1]["role"] == "user":
        return [
            {**turns[1], "content": turns[0]["content"] + "\n\n" + turns[1]["content"]},
            *turns[2:],
        ]
    return [{**turns[0], "role": "user"}, *turns[1:]]


def reads(template: str, name: str) -> bool:
    """Return whether a template mentions a variable."""
    return re.search(rf"(?<![\w.'\"]){re.escape(name)}(?![\w'\"])", template) is not None


def prints_date(tokenizer: Any) -> bool:
    """Return whether the template can print today's date."""
    return reads(tokenizer.chat_template or "", "strftime_now")


@functools.cache
def frozen(template: str, day: date) -> str:
    """Return the template with a `strftime_now` that says `day`, whatever day it is; one without dates as it is.

    A macro in Jinja, because transformers passes no functions to templates. It is for rendering only and never saved: the
    served model prints the true date.
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
    """Return the special markers of a template that are no single token of the vocabulary, and how many tokens each is."""
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
    """Return the added token that a template ends an answer with, if none of the `known` stop tokens does.

    It is the first after the answer that the template does not also write between the context and the answer. None if
    the template refuses a question and an answer, or writes no such token.
    """
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    template = frozen(tokenizer.chat_template, FROZEN_DATE)
    try:
        context = tokenizer.apply_chat_template(
            turns[:1], chat_template=template, add_generation_prompt=True, tokenize=False
        )
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except Exception:  # templates raise anything; the rows' own proofs will say it
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
