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
from ft_assets.data.shapes import RowProblem, conversation_turns, preference_turns, renamed


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
    messages = _checked("messages", conversation_turns(raw))
    if messages[-1]["role"] != "assistant":
        raise RowProblem(f"messages[{len(messages) - 1}]: the last turn is the {messages[-1]['role']}'s; expected the assistant's answer")
    return {"id": _identity(messages), "messages": messages, "group": _group(raw, messages)}


def preference(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the canonical form of a preference row. Raises RowProblem."""
    turns, *answers = preference_turns(raw)
    messages = _checked("prompt", turns)
    if messages[-1]["role"] != "user":
        raise RowProblem(f"prompt[{len(messages) - 1}]: the last turn is the {messages[-1]['role']}'s; expected the user's")
    chosen, rejected = (_text(name, value) for name, value in zip(("chosen", "rejected"), answers, strict=True))
    if chosen.strip() == rejected.strip():
        raise RowProblem("chosen and rejected are equal; expected two different answers")
    return {
        "id": _identity([*messages, {"role": "assistant", "content": chosen}, {"role": "rejected", "content": rejected}]),
        "messages": messages,
        "chosen": chosen,
        "rejected": rejected,
        "group": _group(raw, messages),
    }


def _checked(name: str, turns: list[Any]) -> list[dict[str, str]]:
    """Return turns of role and text in a right order. Raises RowProblem with the index of the first wrong one."""
    if not turns:
        raise RowProblem(f"{name}: is empty")
    checked = [_turn(f"{name}[{index}]", turn) for index, turn in enumerate(turns)]
    expected = "user"
    for index, turn in enumerate(checked):
        if turn["role"] == "system":
            if index:
                raise RowProblem(f"{name}[{index}]: a system turn; expected it first or not at all")
            continue
        if turn["role"] != expected:
            raise RowProblem(f"{name}[{index}]: role {turn['role']!r}; expected {expected!r} (turns alternate)")
        expected = "assistant" if expected == "user" else "user"
    if checked[-1]["role"] == "system":
        raise RowProblem(f"{name}: only a system turn; expected a user turn")
    return checked


def _turn(where: str, turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RowProblem(f"{where}: is a {type(turn).__name__}; expected an object with role and content")
    role = turn.get("role")
    if turn.get("tool_calls") or role in ("tool", "function", "function_call", "observation", "ipython"):
        raise RowProblem(f"{where}: a tool call; tool calls are not supported yet")
    if role not in ("system", "user", "assistant"):
        raise RowProblem(f"{where}: role {role!r}; expected one of system, user, assistant (or human, gpt, …)")
    return {"role": role, "content": _text(where, turn.get("content"))}


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowProblem(f"{where}: content is {'missing' if value is None else f'a {type(value).__name__}'}; expected text")
    if not value.strip():
        raise RowProblem(f"{where}: empty content")
    if "\x00" in value:
        raise RowProblem(f"{where}: holds a NUL character; expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem(f"{where}: holds half of a surrogate pair; expected text") from None
    return value


def _identity(messages: list[dict[str, str]]) -> str:
    return digest(json.dumps([(turn["role"], turn["content"].strip()) for turn in messages], ensure_ascii=False))


def _group(raw: dict[str, Any], messages: list[dict[str, str]]) -> str:
    if isinstance(raw.get("group"), str | int):
        return digest("group", str(raw["group"]))
    return digest("prompt", normalise(next(turn["content"] for turn in messages if turn["role"] == "user")))


def validate(rows: Iterable[RawRow], form: Callable[[dict[str, Any]], dict[str, Any]], columns: dict[str, str] | None = None) -> Validated:
    """Return rows in canonical form, sorted by id so that file order changes nothing; exact duplicates are dropped and counted.

    `columns` are the user's names for ours, {"prompt": "text"}.
    """
    valid: dict[str, dict[str, Any]] = {}
    rejected, duplicates = [], 0
    for row in rows:
        if row.value is None:
            rejected.append({"where": row.where, "problem": row.problem or ""})
            continue
        try:
            canonical = {
                **form(renamed(row.value, columns) if columns else row.value),
                "source": row.where.rsplit(":", 1)[0].rsplit("[", 1)[0],
            }
        except RowProblem as problem:
            rejected.append({"where": row.where, "problem": str(problem)})
            continue
        if canonical["id"] in valid:
            duplicates += 1
        valid.setdefault(canonical["id"], canonical)
    return Validated([valid[key] for key in sorted(valid)], rejected, duplicates)
