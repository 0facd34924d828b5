"""Replace the secrets in texts that leave a process: errors, logs, and Dagster's history.

A secret is replaced by its value where the environment holds it, and by its form elsewhere: the
user of a URL, its query, a header of authorization, a pair such as `api_key=…`, a well-known token.

The borders are few. Errors of this project redact themselves, `guard_stream` wraps the output of a
process, and compat/dagster.py wraps what Dagster stores. A caller needs none of this.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import TextIO
from urllib.parse import quote, unquote

HIDDEN = "***"
SHORTEST = 8  # characters: a shorter value is also an ordinary word
SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|WEBHOOK", re.IGNORECASE
)

_named: set[str] = set()  # variables that settings name as those of secrets

_METHOD = "GET|HEAD|POST|PUT|PATCH|DELETE"
_KEY = (
    r"passw(?:or)?d|secret|api[_-]?key|access[_-]?key(?:[_-]id)?|private[_-]?key|credential"
    r"|signature|\bsig|(?:\b|hf[_-]?|access[_-]?|auth[_-]?|refresh[_-]?|session[_-]?|security[_-]?"
    r"|bearer[_-]?|api[_-]?|bot[_-]?)token"
)
# What Hugging Face, OpenAI, GitHub, Slack, Amazon and Google issue, and JSON Web Tokens.
_ISSUED_KEY = (
    r"\b(?:hf_[a-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[a-z0-9]{30,}|github_pat_\w{30,}"
    r"|xox[abprs]-[\w-]{10,}|(?-i:A(?:KI|SI)A[A-Z0-9]{16})|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)|(?<=hooks\.slack\.com/services/)[\w/]+"
)
ISSUED_KEY = re.compile(_ISSUED_KEY, re.IGNORECASE)
_IN_URL = r"[^\s'\"<>]"  # bounded below: each form takes linear time
_URL_PASSWORD = re.compile(r"\w[\w+.-]*://[^\s/@]*:([^\s@]+)@")
# The user of a URL, also with a / or @ in the password: what follows the colon is no port.
_USER = r"://(?=[^\s/?#'\"<>]{0,999}@|[^\s/@'\"<>]{0,999}:(?!\d{1,5}(?:[/?#\s'\"<>),;]|$)))"
_FORMS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (rf"{_USER}{_IN_URL}{{0,999}}@", rf"://{HIDDEN}@"),
        # Any query of HTTP; elsewhere ? is a glob unless a name and = follow.
        (
            rf"((?:(?:https?|wss?)://[^\s'\"<>?#]*\?)|(?:\b[a-z][a-z0-9+.-]*://[^\s'\"<>?#]*\?"
            rf"(?=[\w.%-]+=))){_IN_URL}*[^\s'\"<>).,;:\]}}]",
            rf"\1{HIDDEN}",
        ),
        (rf"(https?://[^\s'\"<>?#]*#){_IN_URL}*={_IN_URL}*", rf"\1{HIDDEN}"),
        # A path without its host, as urllib3 and access logs write it.
        (rf"((?:with url: |\b(?:{_METHOD}) )/?[^\s?'\"]*\?)[^\s'\"]+", rf"\1{HIDDEN}"),
        (
            rf"([?&][\w.-]*(?:{_KEY}|sig|token|key|auth|policy|jwt)=)[^\s&'\"<>]+",
            rf"\1{HIDDEN}",
        ),
        # Headers, in a request or in the repr of one.
        (
            r"((?:authorization|cookie|x-api-key)['\"]?\s*[:=,]\s*['\"]?(?:[a-z0-9-]+ )?)"
            r"[^\s'\"]{8,}",
            rf"\1{HIDDEN}",
        ),
        (r"\b(bearer|basic) [\w.~+/=-]{16,}", rf"\1 {HIDDEN}"),
        # A pair. After a colon an ordinary word is a sentence.
        (
            rf"((?:{_KEY})['\"]?\s*(?:=|:(?=\s*['\"]|\s*(?-i:[^\s'\"]*[\dA-Z_/+])))\s*['\"]?)"
            r"(?!<)[^\s'\",;&)}]{8,}",
            rf"\1{HIDDEN}",
        ),
        (r"(--[\w-]*(?:token|password|secret|api-key)[ =])\S+", rf"\1{HIDDEN}"),
        (_ISSUED_KEY, HIDDEN),
    )
)


def is_secret_name(name: str) -> bool:
    """Return True if a key or a variable of this name holds a secret."""
    return SECRET_NAME.search(name) is not None


def has_user(url: str) -> bool:
    """Return True if a URL holds a user or a password."""
    return re.search(f"{_USER}.*@", url) is not None


def remember_variables(settings: object) -> None:
    """Treat the variables that settings name by a key `…_env` as secrets, whatever their names."""
    waiting, seen = [settings], set[int]()
    while waiting:  # an alias of YAML may be part of itself, or repeat a part many times
        one = waiting.pop()
        if not isinstance(one, Mapping | list) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Mapping):
            names = (value for key, value in one.items() if str(key).endswith("_env"))
            _named.update(name for name in names if isinstance(name, str))
        waiting += one.values() if isinstance(one, Mapping) else one


def redacted(text: str) -> str:
    """Return a text without secrets: the values of the environment, and what looks like one."""
    text = without_known(text)
    for form, replacement in _FORMS:
        text = form.sub(replacement, text)
    return text


def without_known(text: str) -> str:
    """Return a text, or JSON, without the secret values of the environment."""
    for value in _known():
        text = text.replace(value, HIDDEN)
    return text


def guard_stream(stream: TextIO, redact: Callable[[str], str] = redacted) -> None:
    """Redact what this process writes to a stream from now on, also by handlers that hold it."""
    write = stream.write
    if getattr(write, "redacts", False):
        return

    def redacting(text: str) -> int:
        write(redact(text))
        return len(text)

    redacting.redacts = True  # type: ignore[attr-defined]
    stream.write = redacting  # type: ignore[method-assign]


def _known() -> list[str]:
    """Return the secret values of the environment in each spelling, the longest first.

    The password of a URL is one, e.g. of a database or a proxy. The path of a file is none:
    GOOGLE_APPLICATION_CREDENTIALS. A line of a value is one: a key of several lines is printed line
    by line.
    """
    found: set[str] = set()
    for name, value in os.environ.items():
        if password := _URL_PASSWORD.match(value):
            found |= {password[1], unquote(password[1])}
        if (name in _named or is_secret_name(name)) and not _is_path(value):
            for part in (value, *value.split("\n")):
                found |= {part.strip(), quote(part.strip(), safe=""), json.dumps(part)[1:-1]}
    return sorted((one for one in found if len(one) >= SHORTEST), key=len, reverse=True)


def _is_path(value: str) -> bool:
    try:
        return os.path.isabs(value) and os.path.exists(value)  # noqa: PTH110, PTH117
    except ValueError:
        return False
