"""The formats of raw rows: what data sets call a conversation or a preference, turned into turns.

A format is one entry of CONVERSATION_FORMATS or PREFERENCE_FORMATS. `data.format`, `ft init` and
the list in docs/data.md follow from these tables. Without a name the keys of each row decide. With
a name exactly the keys of that format are read. A row that has no known format is rejected, and the
reason lists its keys.
Not here: files, and the checks of the turns (messages.py). Labelled answers become pairs in
data/kto.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from ft_assets.rows.messages import spelled
from ft_assets.rows.types import RawFields
from ft_assets.rows.values import RowProblem

PROMPT = ("prompt", "instruction", "question", "query", "input", "text")
COMPLETION = ("completion", "output", "response", "answer", "target")
CONTEXT = ("input", "context")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
RANKED = ("responses", "completions", "answers")
# The numbers that rank answers, and the sign that sorts the best one first.
RANKS = {"ranks": 1, "rank": 1, "scores": -1, "score": -1, "rewards": -1}
MEDIA = ("images", "videos", "audios")
SYSTEM = ("system", "system_prompt")


class AnswerPair(NamedTuple):
    """A raw preference: the turns of the prompt and two answers, unchecked."""

    prompt: list[Any]
    chosen: Any
    rejected: Any


ReadT = TypeVar("ReadT", list[Any], AnswerPair)


def _never(raw: RawFields) -> tuple[str, ...] | None:
    return None


@dataclass(frozen=True)
class RowFormat(Generic[ReadT]):
    """One format of raw rows.

    `required` keys must be in a row of this name; `optional` ones are read too. `read` returns the
    turns. `found` returns the keys by which a row without a name is recognised, or None.
    `label` names the format for people, with {} for these keys; `keys` is its line in the docs.
    """

    name: str
    label: str
    keys: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[RawFields], ReadT]
    found: Callable[[RawFields], tuple[str, ...] | None] = _never
    has_answer: bool = True

    def only(self, raw: RawFields) -> RawFields:
        """Return the keys of a row that this format reads. Raises RowProblem if one is missing."""
        missing = next((key for key in self.required if raw.get(key) is None), None)
        if missing is not None:
            raise RowProblem(
                f"{missing}: is missing; the row has the keys {_keys(raw)} "
                f"(data.format: {self.name})"
            )
        read = {*self.required, *self.optional}
        return {key: value for key, value in raw.items() if key in read}


def renamed(raw: RawFields, columns: dict[str, str]) -> RawFields:
    """Return the row with our names for the user's columns (`data.columns`: {ours: theirs}).

    Raises RowProblem.
    """
    missing = [theirs for theirs in columns.values() if theirs not in raw]
    if missing:
        raise RowProblem(f"has no column {missing[0]!r} of data.columns; it has {_keys(raw)}")
    taken = set(columns.values())
    return {key: value for key, value in raw.items() if key not in taken} | {
        ours: raw[theirs] for ours, theirs in columns.items()
    }


def conversation_turns(raw: RawFields, format: str | None = None) -> list[Any]:
    """Return the turns of a conversation row, unchecked. Raises RowProblem."""
    _require_text_only(raw)
    if format is not None:
        named = CONVERSATION_FORMATS[format]
        return named.read(named.only(raw))
    recognised = recognise(raw)
    if recognised is None:
        raise _unknown(raw)
    return recognised[0].read(raw)


def recognise(raw: RawFields) -> tuple[RowFormat[list[Any]], tuple[str, ...]] | None:
    """Return the format that the keys of a conversation row show, with these keys, or None."""
    for known in CONVERSATION_FORMATS.values():
        keys = known.found(raw)
        if keys is not None:
            return known, keys
    return None


def _unknown(raw: RawFields) -> RowProblem:
    for key in CONVERSATIONS:
        if isinstance(raw.get(key), str) and _found_prompt(raw) is None:
            return RowProblem(
                f"{key}: is text that holds no list of turns; expected a list, or its text as JSON"
            )
    known = ["/".join(one.required) for one in CONVERSATION_FORMATS.values() if one.found != _never]
    text = ""
    if _first(raw, PROMPT) == "text":
        text = " (a plain text is trained on only where data.format says so: {train: text})"
    return RowProblem(
        f"has the keys {_keys(raw)}; expected {', '.join(known[:-1])} or {known[-1]} "
        f"(data.columns names other columns){text}"
    )


def preference_turns(raw: RawFields, format: str | None = None) -> AnswerPair:
    """Return the prompt's turns and the two answers of a preference row. Raises RowProblem."""
    _require_text_only(raw)
    if format != "ranked" and "chosen" not in raw and isinstance(raw.get("label"), bool):
        raise RowProblem(
            "is one answer with a label (KTO); "
            "DPO needs a chosen and a rejected answer to the same prompt"
        )
    if format is not None:
        named = PREFERENCE_FORMATS[format]
        return named.read(named.only(raw))
    key = None if "chosen" in raw else _ranked_key(raw)
    ranked = key is not None and bool(raw[key])
    return PREFERENCE_FORMATS["ranked" if ranked else "preference"].read(raw)


def _require_text_only(raw: RawFields) -> None:
    if media := next((key for key in MEDIA if raw.get(key)), None):
        raise RowProblem(f"{media}: cannot be trained on; only text is read")


def _keys(raw: RawFields) -> str:
    return ", ".join(sorted(raw)) or "(none)"


def _first(raw: RawFields, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if raw.get(name) not in (None, "", [])), None)


# Conversations


def _turn_list_key(raw: RawFields) -> str | None:
    return next((name for name in CONVERSATIONS if isinstance(raw.get(name), list)), None)


def _is_sharegpt(turns: list[Any]) -> bool:
    return any(isinstance(turn, dict) and "from" in turn for turn in turns)


def _found_messages(raw: RawFields) -> tuple[str, ...] | None:
    key = _turn_list_key(raw)
    return None if key is None or _is_sharegpt(raw[key]) else (key,)


def _found_sharegpt(raw: RawFields) -> tuple[str, ...] | None:
    key = _turn_list_key(raw)
    return (key,) if key is not None and _is_sharegpt(raw[key]) else None


def _found_prompt(raw: RawFields) -> tuple[str, ...] | None:
    prompt, completion = _first(raw, PROMPT), _first(raw, COMPLETION)
    if prompt is None or completion is None or prompt == completion:
        return None
    return prompt, completion


def _found_alpaca(raw: RawFields) -> tuple[str, ...] | None:
    keys = _found_prompt(raw)
    return keys if keys is not None and keys[0] == "instruction" else None


def _turn_list(raw: RawFields) -> list[Any]:
    key = _turn_list_key(raw)
    if key is None:  # only under a name, which requires the key
        name = next(name for name in CONVERSATIONS if name in raw)
        raise RowProblem(f"{name}: is a {type(raw[name]).__name__}; expected a list of turns")
    return [*_system(raw), *map(spelled, raw[key])]


def _prompt_and_answer(raw: RawFields) -> list[Any]:
    keys = _found_prompt(raw)
    if keys is None:
        raise _unknown(raw)
    prompt, completion = keys
    answer = raw[completion]
    answers = (
        [spelled(turn) for turn in answer]
        if isinstance(answer, list)
        else [{"role": "assistant", "content": answer}]
    )
    return [*_system(raw), *_history(raw), *_prompt_turns(raw, prompt), *answers]


def _plain_text(raw: RawFields) -> list[Any]:
    return [{"role": "text", "content": raw["text"]}]


def _system(raw: RawFields) -> list[Any]:
    key = next((name for name in SYSTEM if raw.get(name) is not None), None)
    if key is None or (isinstance(raw[key], str) and not raw[key].strip()):
        return []
    return [{"role": "system", "content": raw[key]}]


def _history(raw: RawFields) -> list[Any]:
    pairs = raw.get("history")
    if pairs in (None, "", []):
        return []
    if not isinstance(pairs, list | tuple):
        raise RowProblem(
            f"history: is a {type(pairs).__name__}; expected a list of pairs of question and answer"
        )
    turns: list[Any] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowProblem(f"history[{index}]: expected a pair of question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _prompt_turns(raw: RawFields, key: str) -> list[Any]:
    value = raw[key]
    if isinstance(value, list):
        return [spelled(turn) for turn in value]
    context = next((raw[name] for name in CONTEXT if name != key and _has_text(raw, name)), None)
    takes_context = key in ("instruction", "question", "query")
    if takes_context and context is not None and isinstance(value, str):
        value = f"{value}\n{context}"
    return [{"role": "user", "content": value}]


def _has_text(raw: RawFields, name: str) -> bool:
    return isinstance(raw.get(name), str) and bool(raw[name].strip())


# Preferences


def _chosen_and_rejected(raw: RawFields) -> AnswerPair:
    missing = next((key for key in ("chosen", "rejected") if key not in raw), None)
    if missing is not None:
        raise RowProblem(f"{missing}: is missing; the row has the keys {_keys(raw)}")
    return _answer_pair(raw, raw["chosen"], raw["rejected"])


def _ranked_answers(raw: RawFields) -> AnswerPair:
    key = _ranked_key(raw)
    if key is None:
        raise RowProblem(
            f"has no {', '.join(RANKED)}; it has the keys {_keys(raw)} (data.format: ranked)"
        )
    return _answer_pair(raw, *_best_and_worst(raw, raw[key]))


def _ranked_key(raw: RawFields) -> str | None:
    return next((key for key in RANKED if key in raw), None)


def _answer_pair(raw: RawFields, chosen: Any, rejected: Any) -> AnswerPair:
    whole = isinstance(chosen, list) and isinstance(rejected, list)
    if whole and not len(chosen) == len(rejected) == 1:
        return _shared_prefix(raw, list(map(spelled, chosen)), list(map(spelled, rejected)))
    return AnswerPair(
        _preference_prompt(raw), _answer("chosen", chosen), _answer("rejected", rejected)
    )


def _preference_prompt(raw: RawFields) -> list[Any]:
    key = _turn_list_key(raw)
    if key is not None:
        return [*_system(raw), *map(spelled, raw[key])]
    prompt = _first(raw, PROMPT)
    if prompt is None:
        raise RowProblem(f"has no prompt; it has the keys {_keys(raw)}")
    return [*_system(raw), *_history(raw), *_prompt_turns(raw, prompt)]


def _answer(name: str, value: Any) -> Any:
    """Return the text of an answer, which may be a turn or a list of one turn."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    value = spelled(value)
    if not isinstance(value, dict):
        return value
    if value.get("tool_calls") or value.get("function_call"):
        raise RowProblem(f"{name}: has tool calls; the two answers of a preference are texts")
    if value.get("role") not in (None, "assistant"):
        raise RowProblem(f"{name}: is the turn of the {value['role']!r}; expected the assistant's")
    return value.get("content")


def _shared_prefix(raw: RawFields, chosen: list[Any], rejected: list[Any]) -> AnswerPair:
    """Split two whole conversations into the turns they share and their last answers."""
    if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
        pairs = enumerate(zip(chosen, rejected, strict=False))
        shortest = min(len(chosen), len(rejected))
        index = next((number for number, (left, right) in pairs if left != right), shortest)
        raise RowProblem(
            f"chosen and rejected part at messages[{index}]; "
            "expected the same conversation but for the last answer"
        )
    return AnswerPair(
        [*_system(raw), *chosen[:-1]],
        _answer("chosen", chosen[-1]),
        _answer("rejected", rejected[-1]),
    )


def _best_and_worst(raw: RawFields, answers: Any) -> tuple[Any, Any]:
    """Return the best and the worst of ranked answers.

    `ranks` (1 is best) or `scores` (higher is better) order them, else their position.
    """
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowProblem("the ranked answers are not a list of two or more")
    name = next((name for name in RANKS if isinstance(raw.get(name), list)), None)
    if name is None:
        return answers[0], answers[-1]
    values = raw[name]
    if len(values) != len(answers) or not all(map(_is_number, values)):
        raise RowProblem(
            f"{name}: {len(values)} values for {len(answers)} answers; expected a number for each"
        )
    order = sorted(range(len(answers)), key=lambda index: RANKS[name] * values[index])
    if values[order[0]] == values[order[-1]]:
        raise RowProblem(f"{name}: all answers rank the same")
    return answers[order[0]], answers[order[-1]]


def _is_number(value: Any) -> bool:
    """Return True if a value can be ordered: NaN cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


CONVERSATION_FORMATS = {
    known.name: known
    for known in (
        RowFormat(
            name="messages",
            label="conversations ({} of role and content)",
            keys='`messages`: a list of `{"role": …, "content": …}`, with tool calls, and with '
            '`"train": false` on answers that are context only',
            required=("messages",),
            optional=SYSTEM,
            read=_turn_list,
            found=_found_messages,
        ),
        RowFormat(
            name="sharegpt",
            label="ShareGPT ({} of from and value)",
            keys='`conversations`: a list of `{"from": …, "value": …}`',
            required=("conversations",),
            optional=SYSTEM,
            read=_turn_list,
            found=_found_sharegpt,
        ),
        RowFormat(
            name="alpaca",
            label="Alpaca ({} and {})",
            keys="`instruction`, `output`, and optionally `input`, `history`",
            required=("instruction", "output"),
            optional=("input", "history", *SYSTEM),
            read=_prompt_and_answer,
            found=_found_alpaca,
        ),
        RowFormat(
            name="prompt_completion",
            label="prompt and completion ({} and {})",
            keys="`prompt`, `completion`, each a text or a list of messages",
            required=("prompt", "completion"),
            optional=("history", *SYSTEM),
            read=_prompt_and_answer,
            found=_found_prompt,
        ),
        RowFormat(
            name="text",
            label="plain text ({})",
            keys="`text`: plain text, for `train` and `rehearsal` only",
            required=("text",),
            optional=(),
            read=_plain_text,
            has_answer=False,
        ),
    )
}
PREFERENCE_FORMATS = {
    known.name: known
    for known in (
        RowFormat(
            name="preference",
            label="preferences (chosen and rejected)",
            keys="`chosen`, `rejected`, and `prompt` or `messages`; or two whole conversations "
            "that differ in the last answer only",
            required=("chosen", "rejected"),
            optional=("prompt", "messages", "history", *SYSTEM),
            read=_chosen_and_rejected,
        ),
        RowFormat(
            name="sharegpt_preference",
            label="ShareGPT preferences",
            keys="`conversations`, `chosen`, `rejected`",
            required=("conversations", "chosen", "rejected"),
            optional=SYSTEM,
            read=_chosen_and_rejected,
        ),
        RowFormat(
            name="ranked",
            label="ranked answers",
            keys="`responses`, `completions`, or `answers`, with `ranks` (1 is best) or `scores` "
            "(higher is better), else in order",
            required=(),
            optional=("prompt", "messages", "history", *RANKED, *RANKS, *SYSTEM),
            read=_ranked_answers,
        ),
        RowFormat(
            name="kto",
            label="labelled answers",
            keys="one answer with a `label`: a good and a bad answer to the same prompt become a "
            "pair",
            required=("chosen", "rejected"),  # as data/kto.py pairs them
            optional=("messages",),
            read=_chosen_and_rejected,
        ),
    )
}
