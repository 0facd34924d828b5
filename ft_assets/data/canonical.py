"""Canonical conversations and preferences: one form, validated with index-exact messages, ids by content.

A conversation is `{"id", "messages": [{"role", "content"}], "source", "group"}`; a preference adds `chosen` and
`rejected`, each a string that the assistant answers to `messages`. Ids are hashes of normalised content, so that they
survive reordering and renaming of files. `group` is what must stay on one side of the split: rows that share their
first user message (or a declared `group`) share it.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ft_assets.data.formats import RawRow

ROLES = ("system", "user", "assistant")


class RowProblem(Exception):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class Validated:
    """The rows that can be used, and the others with their reason."""

    rows: list[dict[str, Any]]
    rejected: list[dict[str, str]]
    duplicates: int

    @property
    def total(self) -> int:
        return len(self.rows) + len(self.rejected) + self.duplicates

    @property
    def invalid_share(self) -> float:
        return len(self.rejected) / self.total if self.total else 0.0


def normalise(text: str) -> str:
    """Return text for comparison: NFKC, lower case, letters and digits only, single blanks."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", text).strip()


def digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def conversation(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the canonical form of a conversation row. Raises RowProblem."""
    messages = _messages(raw)
    if messages[-1]["role"] != "assistant":
        raise RowProblem(f"messages[{len(messages) - 1}]: the last turn is the {messages[-1]['role']}'s; expected the assistant's answer")
    return {"id": _identity(messages), "messages": messages, "group": _group(raw, messages)}


def preference(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the canonical form of a preference row. Raises RowProblem."""
    prompt = raw.get("prompt", raw.get("messages"))
    messages = _messages({"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt})
    if messages[-1]["role"] != "user":
        raise RowProblem(f"prompt[{len(messages) - 1}]: the last turn is the {messages[-1]['role']}'s; expected the user's")
    chosen, rejected = _answer(raw, "chosen"), _answer(raw, "rejected")
    if chosen.strip() == rejected.strip():
        raise RowProblem("chosen and rejected are equal; expected two different answers")
    return {
        "id": _identity([*messages, {"role": "assistant", "content": chosen}, {"role": "rejected", "content": rejected}]),
        "messages": messages,
        "chosen": chosen,
        "rejected": rejected,
        "group": _group(raw, messages),
    }


def _messages(raw: dict[str, Any]) -> list[dict[str, str]]:
    messages = raw.get("messages")
    if messages is None and isinstance(raw.get("prompt"), str) and isinstance(raw.get("completion"), str):
        messages = [{"role": "user", "content": raw["prompt"]}, {"role": "assistant", "content": raw["completion"]}]
    if not isinstance(messages, list) or not messages:
        raise RowProblem(f"has the keys {sorted(raw)}; expected `messages` (a list of role/content) or `prompt` and `completion`")
    turns = [_turn(index, turn) for index, turn in enumerate(messages)]
    expected = "user"
    for index, turn in enumerate(turns):
        if turn["role"] == "system":
            if index:
                raise RowProblem(f"messages[{index}]: a system turn; expected it first or not at all")
            continue
        if turn["role"] != expected:
            raise RowProblem(f"messages[{index}]: role {turn['role']!r}; expected {expected!r} (turns alternate)")
        expected = "assistant" if expected == "user" else "user"
    if turns[-1]["role"] == "system":
        raise RowProblem("messages: only a system turn; expected a user turn")
    return turns


def _turn(index: int, turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RowProblem(f"messages[{index}]: is a {type(turn).__name__}; expected an object with role and content")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise RowProblem(f"messages[{index}]: role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowProblem(f"messages[{index}]: content is a {type(content).__name__}; expected text")
    if not content.strip():
        raise RowProblem(f"messages[{index}]: empty content")
    return {"role": role, "content": content}


def _answer(raw: dict[str, Any], key: str) -> str:
    value = raw.get(key)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant":
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise RowProblem(f"{key}: {'is missing' if key not in raw else 'is not a text'}; expected the assistant's answer")
    return value


def _identity(messages: list[dict[str, str]]) -> str:
    return digest(json.dumps([(turn["role"], turn["content"].strip()) for turn in messages], ensure_ascii=False))


def _group(raw: dict[str, Any], messages: list[dict[str, str]]) -> str:
    if isinstance(raw.get("group"), str | int):
        return digest("group", str(raw["group"]))
    return digest("prompt", normalise(next(turn["content"] for turn in messages if turn["role"] == "user")))


def validate(rows: Iterable[RawRow], form: Callable[[dict[str, Any]], dict[str, Any]]) -> Validated:
    """Return rows in canonical form, sorted by id so that file order changes nothing; exact duplicates are dropped and counted."""
    valid: dict[str, dict[str, Any]] = {}
    rejected, duplicates = [], 0
    for row in rows:
        if row.value is None:
            rejected.append({"where": row.where, "problem": row.problem or ""})
            continue
        try:
            canonical = {**form(row.value), "source": row.where.rsplit(":", 1)[0].rsplit("[", 1)[0]}
        except RowProblem as problem:
            rejected.append({"where": row.where, "problem": str(problem)})
            continue
        if canonical["id"] in valid:
            duplicates += 1
        valid.setdefault(canonical["id"], canonical)
    return Validated([valid[key] for key in sorted(valid)], rejected, duplicates)
