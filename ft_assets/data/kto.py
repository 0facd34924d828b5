"""Labelled answers (KTO) -> preference pairs: a good and a bad answer to the same prompt, in the order they come.

Only answers that wait for their other are held. Not here: whether a pair can be used (canonical.py).
"""

import hashlib
import json
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ft_assets.data.canonical import conversation
from ft_assets.data.file_formats import RawRow
from ft_assets.data.messages import shown
from ft_assets.data.row_formats import RowProblem, renamed

SPELLED = {
    "true": True,
    "1": True,
    "false": False,
    "0": False,
}  # of a label in a table of texts, read only where kto is named


@dataclass(frozen=True)
class _Answer:
    number: int
    where: str
    turns: list[dict[str, Any]]
    beside: dict[str, Any]


@dataclass
class _Waiting:
    """The answers to one prompt that have no other yet; never of both labels at once."""

    answers: dict[bool, deque[_Answer]] = field(
        default_factory=lambda: {True: deque(), False: deque()}
    )


def pair_labels(
    rows: Iterable[RawRow], format: str | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[RawRow]:
    """Yield rows with labelled answers made pairs; rows without a label pass as they are.

    A labelled answer is {prompt | messages | …, completion, label: true | false}. Each without another comes last, with
    the problem. With `format` kto a row without a label is a problem, and labels may be 0, 1 or their texts. `columns` are
    the user's names for ours; rows come out under ours, so that nobody may rename them again.
    """
    waiting: dict[str, _Waiting] = {}
    for number, row in enumerate(rows):
        if row.value is None:
            yield row
            continue
        try:
            value = renamed(row.value, dict(columns)) if columns else row.value
            label = _label(value, format)
            if label is None:
                yield RawRow(row.where, value)
                continue
            answer = _answer(number, row.where, value)
        except RowProblem as problem:
            yield RawRow(row.where, None, str(problem))
            continue
        key = _prompt_key(answer)
        others = waiting.setdefault(key, _Waiting()).answers
        if not others[not label]:
            others[label].append(answer)
            continue
        other = others[not label].popleft()
        if not any(others.values()):
            del waiting[key]
        yield _pair(answer, other) if label else _pair(other, answer)
    yield from _alone(waiting)


def _label(value: dict[str, Any], format: str | None) -> bool | None:
    """Return the label of a row, or None for one that is no labelled answer. Raises RowProblem."""
    label = value.get("label")
    if format != "kto":
        return (
            label
            if isinstance(label, bool) and "chosen" not in value and "rejected" not in value
            else None
        )
    if isinstance(label, bool):
        return label
    if isinstance(label, int | str) and str(label).strip().lower() in SPELLED:
        return SPELLED[str(label).strip().lower()]
    raise RowProblem(
        f"label: is {'missing' if label is None else shown(label)}; expected true or false (data.format: kto)"
    )


def _answer(number: int, where: str, value: dict[str, Any]) -> _Answer:
    row = conversation({key: part for key, part in value.items() if key != "label"})
    last = row["messages"][-1]
    if "tool_calls" in last:
        raise RowProblem(
            "the labelled answer has tool calls; the two answers of a preference are texts"
        )
    beside = {
        key: given
        for key, given in (("tools", row.get("tools")), ("group", value.get("group")))
        if given is not None
    }
    return _Answer(number, where, row["messages"], beside)


def _prompt_key(answer: _Answer) -> str:
    # Not canonical.normalise: it drops signs, and an answer to 2 + 2 is none to 2 - 2.
    turns = [
        (
            turn["role"],
            " ".join(unicodedata.normalize("NFKC", turn["content"]).casefold().split()),
            turn.get("tool_calls"),
        )
        for turn in answer.turns[:-1]
    ]
    text = json.dumps([turns, answer.beside.get("tools")], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _pair(good: _Answer, bad: _Answer) -> RawRow:
    chosen, rejected = good.turns[-1]["content"], bad.turns[-1]["content"]
    return RawRow(
        _both(good.where, bad.where),
        {"messages": good.turns[:-1], "chosen": chosen, "rejected": rejected, **good.beside},
    )


def _both(one: str, other: str) -> str:
    """Return where a pair stands: rows.jsonl:3+5, rows.json[3+5], or a.jsonl + b.jsonl:3+5."""
    mark = "[" if one.endswith("]") and other.endswith("]") else ":"
    file, _, row = one.rpartition(mark)
    other_file, _, other_row = other.rpartition(mark)
    files = file if file == other_file else f"{file} + {other_file}"
    return f"{files}{mark}{row.rstrip(']')}+{other_row}"


def _alone(waiting: Mapping[str, _Waiting]) -> Iterator[RawRow]:
    left = [
        (answer, label)
        for entry in waiting.values()
        for label, answers in entry.answers.items()
        for answer in answers
    ]
    for answer, label in sorted(left, key=lambda entry: entry[0].number):
        have, lack = ("good", "bad") if label else ("bad", "good")
        yield RawRow(
            answer.where,
            None,
            f"is a {have} answer (label {str(label).lower()}); no {lack} one to the same prompt is left to pair it with",
        )
