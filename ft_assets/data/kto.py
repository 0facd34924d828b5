"""Pair labelled answers (KTO) into preferences: a good and a bad answer to the same prompt.

Answers are paired in the order they come. Only unpaired answers are in memory. Answers without a
partner are trained as they are, or are left out.
Not here: the check of a pair (canonical.py).
"""

import hashlib
import json
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ft_assets.data.canonical import conversation
from ft_assets.data.raw_row import RawRow
from ft_assets.rows.cells import plain
from ft_assets.rows.columns import IDS, Columns
from ft_assets.rows.row_formats import RANKS, SCORED, renamed
from ft_assets.rows.types import Message, RawFields
from ft_assets.rows.values import RowProblem, shown

# Labels in a table of texts; they are read only where data.format is kto.
SPELLED = {
    **dict.fromkeys(("true", "1", "1.0", "yes"), True),
    **dict.fromkeys(("false", "0", "0.0", "no"), False),
}
THUMBS = ("thumbs", "thumb")  # keys of a label that is a thumb
LABELS = ("label", *THUMBS)
SPELLED_THUMBS = {
    **SPELLED,
    **dict.fromkeys(("up", "thumbs_up", "👍", "+1"), True),
    **dict.fromkeys(("down", "thumbs_down", "👎", "-1"), False),
}
EMPTY = (None, "")
# Unread columns that would mean something else beside a pair.
OF_PAIRS = frozenset(("chosen", "rejected", *SCORED, *RANKS))
Lone = Literal["auto", "use", "leave"]


@dataclass(frozen=True)
class _Answer:
    """A labelled answer: its turns, and the other fields that its pair gets.

    `unread` are the columns that no turn shows. They are counted with the pair.
    """

    number: int
    where: str
    turns: list[Message]
    other_fields: RawFields
    unread: RawFields


@dataclass
class _Unpaired:
    """The unpaired answers to one prompt, by label; never of both labels at the same time."""

    answers: dict[bool, deque[_Answer]] = field(
        default_factory=lambda: {True: deque(), False: deque()}
    )


def pair_labels(
    rows: Iterable[RawRow],
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    lone: Lone = "auto",
) -> Iterator[RawRow]:
    """Yield rows with labelled answers made pairs; rows without a label pass unchanged.

    A labelled answer is {prompt | messages | …, completion, label: true | false}. The label can
    also be a thumb: {thumbs: up | down}. Answers without a partner come last: as labelled answers
    if `lone` is use, or if it is auto and there is no pair; else each with its problem. A row whose
    label is null, as most of production's are, is left out. If `format` is kto, a row without a
    label is a problem, and labels may be 0, 1 or their texts. `columns` are the user's names for
    our columns; rows are yielded with our names, so do not rename them again.
    """
    unpaired: dict[str, _Unpaired] = {}
    pairs = 0
    accounts = Columns()
    for number, row in enumerate(rows):
        if row.value is None:
            yield row
            continue
        try:
            value = renamed(row.value, dict(columns)) if columns else row.value
            label = _label(value, format)
            if label is None:
                unlabelled = _is_unlabelled(value)
                pairs += not unlabelled
                yield RawRow(
                    row.where, value, *(("has no label", "unlabelled") if unlabelled else ())
                )
                continue
            answer = _answer(number, row.where, value, accounts)
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
        pair = _pair(answer, partner) if label else _pair(partner, answer)
        pairs += not pair.left_out
        yield pair
    use = lone == "use" or (lone == "auto" and not pairs)
    yield from _lone(unpaired) if use else _problems(unpaired)


def is_labelled(value: RawFields) -> bool:
    """Return True for an answer whose label, or whose thumb, is true or false."""
    try:
        if _label(value, None) is None:
            return False
        conversation(_unlabelled(value))
    except RowProblem:
        return False
    return True


def _label(value: RawFields, format: str | None) -> bool | None:
    """Return the label of a row, or None if it is not a labelled answer. Raises RowProblem."""
    label = value.get("label")
    if (thumb := _thumb(value)) is not None:
        return thumb
    if format != "kto":
        is_pair = "chosen" in value or "rejected" in value
        return label if isinstance(label, bool) and not is_pair else None
    if isinstance(label, bool):
        return label
    if isinstance(label, int | str) and str(label).strip().lower() in SPELLED:
        return SPELLED[str(label).strip().lower()]
    found = "missing" if label is None else shown(label)
    raise RowProblem(f"label: is {found}; expected true or false (data.format: kto)")


def _thumb(value: RawFields) -> bool | None:
    key = next((key for key in THUMBS if value.get(key) not in EMPTY), None)
    if key is None or "chosen" in value or "rejected" in value:
        return None
    said = value[key]
    spelled = SPELLED_THUMBS.get(str(said).strip().lower()) if isinstance(said, str | int) else None
    if spelled is None:
        raise RowProblem(f"{key}: is {shown(said)}; expected up or down")
    return spelled


def _is_unlabelled(value: RawFields) -> bool:
    """Return True for an answer that has a key for its label, and nothing in it."""
    keys = [key for key in LABELS if key in value]
    if not keys or any(value[key] not in EMPTY for key in keys):
        return False
    try:
        conversation(_unlabelled(value))
    except RowProblem:
        return False
    return "chosen" not in value and "rejected" not in value


def _unlabelled(value: RawFields) -> RawFields:
    return {key: part for key, part in value.items() if key not in LABELS}


def _answer(number: int, where: str, value: RawFields, accounts: Columns) -> _Answer:
    said = plain(_unlabelled(value))
    row = conversation(said)
    if "tool_calls" in row["messages"][-1]:
        raise RowProblem(
            "the labelled answer has tool calls; the two answers of a preference are texts"
        )
    own = next((key for key in IDS if value.get(key)), "id")
    given = {"tools": row.get("tools"), "group": value.get("group"), "id": value.get(own)}
    other_fields = {key: part for key, part in given.items() if part is not None}
    unread = {name: said[name] for name in accounts.others(said) if name not in OF_PAIRS}
    return _Answer(number, where, row["messages"], other_fields, unread)


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
        **bad.unread,
        **good.unread,
        "messages": good.turns[:-1],
        "chosen": good.turns[-1],
        "rejected": bad.turns[-1],
        **good.other_fields,
    }
    where = _both(good.where, bad.where)
    if good.turns[-1]["content"].strip() == bad.turns[-1]["content"].strip():
        problem = "people disagree: the same answer is labelled true and false"
        return RawRow(where, pair, problem, left_out="disputed")
    return RawRow(where, pair)


def _both(one: str, other: str) -> str:
    """Return the place of a pair: rows.jsonl:3+5, rows.json[3+5], or a.jsonl + b.jsonl:3+5."""
    mark = "[" if one.endswith("]") and other.endswith("]") else ":"
    file, _, row = one.rpartition(mark)
    other_file, _, other_row = other.rpartition(mark)
    files = file if file == other_file else f"{file} + {other_file}"
    return f"{files}{mark}{row.rstrip(']')}+{other_row}"


def _lone(unpaired: Mapping[str, _Unpaired]) -> Iterator[RawRow]:
    """Yield the answers without a partner as labelled answers: see canonical.labelled."""
    for answer, label in _left(unpaired):
        turns = {"messages": answer.turns, "label": label}
        yield RawRow(answer.where, {**answer.unread, **answer.other_fields, **turns})


def _left(unpaired: Mapping[str, _Unpaired]) -> list[tuple[_Answer, bool]]:
    """Return the answers without a partner and their labels, in the order of the rows."""
    left = [
        (answer, label)
        for entry in unpaired.values()
        for label, answers in entry.answers.items()
        for answer in answers
    ]
    return sorted(left, key=lambda entry: entry[0].number)


def _problems(unpaired: Mapping[str, _Unpaired]) -> Iterator[RawRow]:
    for answer, label in _left(unpaired):
        kind, missing = ("good", "bad") if label else ("bad", "good")
        value: RawFields = {**answer.other_fields, "messages": answer.turns, "label": label}
        yield RawRow(
            answer.where,
            value,
            f"is a {kind} answer (label {str(label).lower()}); "
            f"no {missing} answer to the same prompt is left to pair it with",
            left_out="unpaired",
        )
