"""Pair labelled answers (KTO) into preferences: a good and a bad answer to the same prompt.

Answers are paired in the order they come. Only unpaired answers are in memory.
Not here: the check of a pair (canonical.py).
"""

import hashlib
import json
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ft_assets.data.canonical import conversation
from ft_assets.data.raw_row import RawRow
from ft_assets.rows.columns import IDS
from ft_assets.rows.row_formats import renamed
from ft_assets.rows.types import Message, RawFields
from ft_assets.rows.values import RowProblem, shown

# Labels in a table of texts; they are read only where data.format is kto.
SPELLED = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class _Answer:
    """A labelled answer: its turns, and the other fields that its pair gets."""

    number: int
    where: str
    turns: list[Message]
    other_fields: RawFields


@dataclass
class _Unpaired:
    """The unpaired answers to one prompt, by label; never of both labels at the same time."""

    answers: dict[bool, deque[_Answer]] = field(
        default_factory=lambda: {True: deque(), False: deque()}
    )


def pair_labels(
    rows: Iterable[RawRow], format: str | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[RawRow]:
    """Yield rows with labelled answers made pairs; rows without a label pass unchanged.

    A labelled answer is {prompt | messages | …, completion, label: true | false}. Answers without
    a partner come last, each with its problem. If `format` is kto, a row without a label is a
    problem, and labels may be 0, 1 or their texts. `columns` are the user's names for our columns;
    rows are yielded with our names, so do not rename them again.
    """
    unpaired: dict[str, _Unpaired] = {}
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
        answers = unpaired.setdefault(key, _Unpaired()).answers
        if not answers[not label]:
            answers[label].append(answer)
            continue
        partner = answers[not label].popleft()
        if not any(answers.values()):
            del unpaired[key]
        yield _pair(answer, partner) if label else _pair(partner, answer)
    yield from _problems(unpaired)


def _label(value: RawFields, format: str | None) -> bool | None:
    """Return the label of a row, or None if it is not a labelled answer. Raises RowProblem."""
    label = value.get("label")
    if format != "kto":
        is_pair = "chosen" in value or "rejected" in value
        return label if isinstance(label, bool) and not is_pair else None
    if isinstance(label, bool):
        return label
    if isinstance(label, int | str) and str(label).strip().lower() in SPELLED:
        return SPELLED[str(label).strip().lower()]
    found = "missing" if label is None else shown(label)
    raise RowProblem(f"label: is {found}; expected true or false (data.format: kto)")


def _answer(number: int, where: str, value: RawFields) -> _Answer:
    row = conversation({key: part for key, part in value.items() if key != "label"})
    if "tool_calls" in row["messages"][-1]:
        raise RowProblem(
            "the labelled answer has tool calls; the two answers of a preference are texts"
        )
    own = next((key for key in IDS if value.get(key)), "id")
    given = {"tools": row.get("tools"), "group": value.get("group"), "id": value.get(own)}
    other_fields = {key: part for key, part in given.items() if part is not None}
    return _Answer(number, where, row["messages"], other_fields)


def _prompt_key(answer: _Answer) -> str:
    # canonical.normalise drops signs, and an answer to 2 + 2 is not an answer to 2 - 2.
    turns = [
        (
            turn["role"],
            " ".join(unicodedata.normalize("NFKC", turn["content"]).casefold().split()),
            turn.get("tool_calls"),
        )
        for turn in answer.turns[:-1]
    ]
    content = [turns, answer.other_fields.get("tools")]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _pair(good: _Answer, bad: _Answer) -> RawRow:
    pair: RawFields = {
        "messages": good.turns[:-1],
        "chosen": good.turns[-1],
        "rejected": bad.turns[-1],
        **good.other_fields,
    }
    return RawRow(_both(good.where, bad.where), pair)


def _both(one: str, other: str) -> str:
    """Return the place of a pair: rows.jsonl:3+5, rows.json[3+5], or a.jsonl + b.jsonl:3+5."""
    mark = "[" if one.endswith("]") and other.endswith("]") else ":"
    file, _, row = one.rpartition(mark)
    other_file, _, other_row = other.rpartition(mark)
    files = file if file == other_file else f"{file} + {other_file}"
    return f"{files}{mark}{row.rstrip(']')}+{other_row}"


def _problems(unpaired: Mapping[str, _Unpaired]) -> Iterator[RawRow]:
    left = [
        (answer, label)
        for entry in unpaired.values()
        for label, answers in entry.answers.items()
        for answer in answers
    ]
    for answer, label in sorted(left, key=lambda entry: entry[0].number):
        kind, missing = ("good", "bad") if label else ("bad", "good")
        value: RawFields = {**answer.other_fields, "messages": answer.turns, "label": label}
        yield RawRow(
            answer.where,
            value,
            f"is a {kind} answer (label {str(label).lower()}); "
            f"no {missing} answer to the same prompt is left to pair it with",
            left_out="unpaired",
        )
