"""The rows that differ between two sets of rows: added, removed, or with another answer."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

COLUMNS = ("id", "messages", "chosen", "rejected")
SHOWN = 40  # rows of each kind


@dataclass(frozen=True)
class Row:
    """A row as text. `answer` is None for one that only the other set has."""

    prompt: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class RowChanges:
    """The differences of one table, at most SHOWN rows of each kind, with their numbers."""

    table: str
    before: int
    after: int
    added: int
    removed: int
    changed: int
    rows: list[Row]

    @property
    def is_same(self) -> bool:
        return not (self.added or self.removed or self.changed)


def row_changes(name: str, before: Path, after: Path) -> RowChanges:
    """Compare two tables of rows. A row is changed if its prompt is the same."""
    old, new = _by_prompt(before), _by_prompt(after)
    added = [Row(prompt, None, text) for prompt, text in new.items() if prompt not in old]
    removed = [Row(prompt, text, None) for prompt, text in old.items() if prompt not in new]
    changed = [
        Row(prompt, old[prompt], text)
        for prompt, text in new.items()
        if prompt in old and old[prompt] != text
    ]
    shown = [*changed[:SHOWN], *added[:SHOWN], *removed[:SHOWN]]
    return RowChanges(
        table=name,
        before=_count(before),
        after=_count(after),
        added=len(added),
        removed=len(removed),
        changed=len(changed),
        rows=shown,
    )


def as_text(messages: Iterable[Mapping[str, Any]]) -> str:
    """Return turns as text, each with its role if there are several."""
    turns = [(turn["role"], _content(turn)) for turn in messages]
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join(f"{role}: {text}" for role, text in turns)


def _content(turn: Mapping[str, Any]) -> str:
    calls = turn.get("tool_calls")
    text = turn["content"] or ""
    return f"{text} {json.dumps(calls, ensure_ascii=False)}".strip() if calls else text


def _by_prompt(path: Path) -> dict[str, str]:
    """Return {prompt: answer}. Rows with equal prompts are numbered."""
    found: dict[str, str] = {}
    with pq.ParquetFile(path) as table:
        names = [name for name in COLUMNS if name in table.schema_arrow.names]
        for row in table.read(columns=names).to_pylist():
            prompt, answer = _parts(row)
            number, key = 1, prompt
            while key in found:
                number += 1
                key = f"{prompt}\n(row {number} with this prompt)"
            found[key] = answer
    return found


def _parts(row: Mapping[str, Any]) -> tuple[str, str]:
    if "chosen" in row:
        return as_text(row["messages"]), f"chosen: {row['chosen']}\nrejected: {row['rejected']}"
    return as_text(row["messages"][:-1]), as_text(row["messages"][-1:])


def _count(path: Path) -> int:
    with pq.ParquetFile(path) as table:
        return table.metadata.num_rows
