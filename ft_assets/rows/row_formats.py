"""The formats of raw rows: what data sets call a conversation or a preference, turned into turns.

A format is one entry of CONVERSATION_FORMATS or PREFERENCE_FORMATS. `data.format`, `ft init` and
the list in docs/data.md follow from these tables. Without a name the keys of each row decide. With
a name exactly the keys of that format are read. A row that has no known format is rejected, and the
reason lists its keys.
Not here: files, and the checks of the turns (messages.py). Labelled answers become pairs in
data/kto.py.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from math import isnan
from typing import Any, Generic, NamedTuple, TypeVar

from ft_assets.rows.calls_as_text import expanded
from ft_assets.rows.messages import spelled, turns_of
from ft_assets.rows.transcripts import transcribed
from ft_assets.rows.turn_keys import REASONING, require_no_flag
from ft_assets.rows.types import RawFields
from ft_assets.rows.values import RowProblem, Tie, shown

PROMPT = ("prompt", "instruction", "question", "query", "input", "text")
COMPLETION = ("completion", "output", "response", "answer", "target")
CONTEXT = ("input", "context")
# Prompts that a context is joined to. It is not joined to others.
JOINED = ("instruction", "question", "query")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
TRANSCRIPTS = ("chat", "transcript", "text")  # lists of turns once transcripts.py has read them
RANKED = ("responses", "completions", "answers")
# The numbers that rank answers, and the sign that sorts the best one first.
RANKS = {"ranks": 1, "rank": 1, "scores": -1, "score": -1, "rewards": -1}
# Columns with the scores of both answers of a pair (higher is better).
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
TIES = ("status", "winner", "preference")  # columns that can have the word "tie"
# Answers that annotators compare, as Chatbot Arena's; `winner` names one of them.
COMPARED = ("conversation", "response", "answer", "completion")
SCORED = frozenset((*TIES, *(name for pair in SCORES for name in pair)))
# The same beside the text of each answer.
OWN_RANKS = {**RANKS, "overall_score": -1, "rating": -1, "reward": -1}
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


# {name in data.columns: key of a row}. Only data.columns can set these keys: a column of another
# table that is called `reasoning` may be a note about the row.
THOUGHTS = {
    "reasoning": "(reasoning)",
    "chosen_reasoning": "(reasoning of chosen)",
    "rejected_reasoning": "(reasoning of rejected)",
}


def renamed(raw: RawFields, columns: dict[str, str]) -> RawFields:
    """Return the row with our names for the user's columns (`data.columns`: {ours: theirs}).

    Raises RowProblem.
    """
    missing = [theirs for theirs in columns.values() if theirs not in raw]
    if missing:
        raise RowProblem(f"has no column {missing[0]!r} of data.columns; it has {_keys(raw)}")
    taken = set(columns.values())
    return {key: value for key, value in raw.items() if key not in taken} | {
        THOUGHTS.get(ours, ours): raw[theirs] for ours, theirs in columns.items()
    }


def conversation_turns(raw: RawFields, format: str | None = None) -> list[Any]:
    """Return the turns of a conversation row, unchecked. Raises RowProblem."""
    _require_text_only(raw)
    require_no_flag(raw)
    _require_read(raw, ("reasoning",), "a conversation")
    if format is not None:
        named = CONVERSATION_FORMATS[format]
        return _thought(raw, expanded(named.read(named.only(raw))))
    raw = transcribed(raw)
    recognised = _recognise(raw)
    if recognised is None:
        raise _unknown(raw)
    return _thought(raw, expanded(recognised[0].read(raw)))


def _thought(raw: RawFields, turns: list[Any]) -> list[Any]:
    """Return the turns with the reasoning that data.columns names before the last answer."""
    return [*turns[:-1], _with_thought(raw.get(THOUGHTS["reasoning"]), turns[-1])] if turns else []


def _require_read(raw: RawFields, names: tuple[str, ...], kind: str) -> None:
    """Raise RowProblem for reasoning that data.columns names and that a row does not read."""
    for name, key in THOUGHTS.items():
        if name not in names and not _is_empty(raw.get(key)):
            raise RowProblem(
                f"data.columns names {name}, which {kind} does not read; expected "
                f"{' and '.join(names)}"
            )


def _is_empty(reasoning: Any) -> bool:
    return reasoning is None or (isinstance(reasoning, str) and not reasoning.strip())


def _with_thought(reasoning: Any, answer: Any) -> Any:
    """Return an answer, a text or a turn, as a turn with its reasoning; unchanged without one."""
    if _is_empty(reasoning):
        return answer
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    turn = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
    if any(turn.get(key) not in (None, "", reasoning) for key in REASONING):
        raise RowProblem("the answer has reasoning in its turn, and another one in its column")
    return {**turn, REASONING[0]: reasoning}


def recognise(raw: RawFields) -> tuple[RowFormat[list[Any]], tuple[str, ...]] | None:
    """Return the format that the keys of a conversation row show, with these keys, or None."""
    return _recognise(transcribed(raw))


def _recognise(raw: RawFields) -> tuple[RowFormat[list[Any]], tuple[str, ...]] | None:
    for known in CONVERSATION_FORMATS.values():
        keys = known.found(raw)
        if keys is not None:
            return known, keys
    return None


def _unknown(raw: RawFields) -> RowProblem:
    for key in CONVERSATIONS:
        if isinstance(raw.get(key), str) and _found_prompt(raw) is None:
            return RowProblem(
                f"{key}: is text that holds no list of turns; expected a list, or its text as JSON "
                "(data.transcript reads a conversation that is one text)"
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
    require_no_flag(raw)
    _require_read(raw, ("chosen_reasoning", "rejected_reasoning"), "a pair")
    labelled = "chosen" not in raw and _first(raw, COMPLETION) and raw.get("label") is not None
    if format is None and labelled and not isinstance(raw["label"], bool):
        raise RowProblem(
            f"label: is {shown(raw['label'])}; expected true or false (KTO). If the labels are "
            "texts or numbers, write data.format: {preferences: kto}"
        )
    if format != "ranked" and "chosen" not in raw and isinstance(raw.get("label"), bool):
        raise RowProblem(
            "is one answer with a label (KTO); "
            "DPO needs a chosen and a rejected answer to the same prompt"
        )
    _require_preference(raw)
    raw = _compared(transcribed(raw))
    if format is not None:
        named = PREFERENCE_FORMATS[format]
        pair = named.read(named.only(raw))
    else:
        key = None if "chosen" in raw else _ranked_key(raw)
        ranked = key is not None and bool(raw[key])
        pair = PREFERENCE_FORMATS["ranked" if ranked else "preference"].read(raw)
    chosen, rejected = (
        _with_thought(raw.get(THOUGHTS[f"{side}_reasoning"]), answer)
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
    )
    return AnswerPair(expanded(pair.prompt), chosen, rejected)


def prompt_turns(raw: RawFields, format: str | None = None) -> list[Any]:
    """Return the turns of a row that needs no answer, unchecked. Raises RowProblem."""
    _require_text_only(raw)
    if format == "text":
        return [{"role": "user", "content": CONVERSATION_FORMATS[format].only(raw)["text"]}]
    if format is not None:
        return conversation_turns(raw, format)
    if "chosen" in raw:
        return preference_turns(raw).prompt
    raw = transcribed(raw)
    turns = _preference_prompt(raw)
    if not turns:
        raise RowProblem(f"has no prompt; it has the keys {_keys(raw)}")
    return expanded(_with_system(raw, turns))


def _require_preference(raw: RawFields) -> None:
    """Raise Tie or RowProblem if the row's own scores do not prefer the chosen answer."""
    if raw.keys().isdisjoint(SCORED):
        return
    tie = next((key for key in TIES if str(raw.get(key)).lower().startswith("tie")), None)
    if tie is not None:
        raise Tie(f"{tie}: is {shown(raw[tie])}")
    for better, worse in SCORES:
        chosen, rejected = _number(raw.get(better)), _number(raw.get(worse))
        if chosen is None or rejected is None or chosen > rejected:
            continue
        if chosen == rejected:
            raise Tie(f"{better} and {worse} are both {chosen}")
        raise RowProblem(
            f"{better} is {chosen} and {worse} is {rejected}; "
            "expected the higher score for the chosen answer"
        )


def _compared(raw: RawFields) -> RawFields:
    """Return a row of two compared answers with the winner as chosen. Raises RowProblem."""
    name = next((name for name in COMPARED if {f"{name}_a", f"{name}_b"} <= raw.keys()), None)
    if name is None or "chosen" in raw or "winner" not in raw:
        return raw
    winner = str(raw["winner"]).lower().rpartition("_")[2]
    if winner not in ("a", "b"):
        raise RowProblem(f"winner: is {shown(raw['winner'])}; expected model_a, model_b or tie")
    loser = "b" if winner == "a" else "a"
    return {**raw, "chosen": raw[f"{name}_{winner}"], "rejected": raw[f"{name}_{loser}"]}


def _require_text_only(raw: RawFields) -> None:
    if media := next((key for key in MEDIA if raw.get(key)), None):
        raise RowProblem(f"{media}: cannot be trained on; only text is read")


def _keys(raw: RawFields) -> str:
    return ", ".join(sorted(raw)) or "(none)"


def _first(raw: RawFields, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if raw.get(name) not in (None, "", [])), None)


# Conversations


def _turn_list_key(raw: RawFields) -> str | None:
    names = (*CONVERSATIONS, *TRANSCRIPTS)
    return next((name for name in names if isinstance(raw.get(name), list)), None)


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
    return _with_system(raw, turns_of(raw[key]))


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
    turns = [*_history(raw), *_prompt_turns(raw, prompt)]
    if answers and _said(answers[0])[0] != "assistant":  # a whole conversation
        turns = _joined(turns, answers[:-1])
        answers = answers[-1:]
    return _with_system(raw, [*turns, *answers])


def _plain_text(raw: RawFields) -> list[Any]:
    return [{"role": "text", "content": raw["text"]}]


def _with_system(raw: RawFields, turns: list[Any]) -> list[Any]:
    """Return the turns with the system turn of a column before them.

    Raises RowProblem if they begin with another system turn.
    """
    given = [key for key in SYSTEM if raw.get(key) is not None and str(raw[key]).strip()]
    if not given:
        return turns
    found = {key: raw[key] for key in given}
    if turns and _said(turns[0])[0] == "system":
        found["the system turn"] = turns[0]["content"]
    if len({str(value).strip() for value in found.values()}) > 1:
        raise RowProblem(
            f"{' and '.join(found)} have different texts; "
            "expected one of them: write both texts into one, or remove one"
        )
    if "the system turn" in found:
        return turns
    return [{"role": "system", "content": raw[given[0]]}, *turns]


def _said(turn: Any) -> tuple[Any, ...]:
    """Return the parts of a turn by which two turns are compared: its role, text, and calls."""
    if not isinstance(turn, dict):
        return ("", turn)
    content = turn.get("content")
    text = content.strip() if isinstance(content, str) else content
    return (turn.get("role"), text, turn.get("tool_calls"), *map(turn.get, REASONING))


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
    context = context_column(raw, key)
    if context is not None:
        value = f"{value}\n{raw[context]}"
    return [{"role": "user", "content": value}]


def context_column(raw: RawFields, prompt: str) -> str | None:
    """Return the column whose text is joined to that of the column `prompt`, or None."""
    if prompt not in JOINED or not isinstance(raw.get(prompt), str):
        return None
    return next((name for name in CONTEXT if name != prompt and _has_text(raw, name)), None)


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
    prompt = _preference_prompt(raw)
    if not prompt:
        raise RowProblem(f"has no prompt; it has the keys {_keys(raw)}")
    return AnswerPair(_with_system(raw, prompt), chosen, rejected)


def _preference_prompt(raw: RawFields) -> list[Any]:
    key = _turn_list_key(raw)
    if key is not None:
        return turns_of(raw[key])
    prompt = _first(raw, PROMPT)
    return [] if prompt is None else [*_history(raw), *_prompt_turns(raw, prompt)]


def _shared_prefix(raw: RawFields, chosen: list[Any], rejected: list[Any]) -> AnswerPair:
    """Split two whole conversations, or tails of one, into what they share and the last answers."""
    left, right = list(map(_said, chosen)), list(map(_said, rejected))
    if left[:-1] != right[:-1] or not chosen:
        pairs = enumerate(zip(left, right, strict=False))
        shortest = min(len(left), len(right))
        index = next((number for number, (one, two) in pairs if one != two), shortest)
        raise RowProblem(
            f"chosen and rejected part at messages[{index}]; "
            "expected the same conversation but for the last answer"
        )
    prompt = _preference_prompt(raw)
    # Some data sets repeat the chosen conversation in `messages`.
    if list(map(_said, prompt)) in (left, right):
        prompt = prompt[:-1]
    turns = _joined(prompt, chosen[:-1])
    if not turns:
        raise RowProblem(f"has no prompt; it has the keys {_keys(raw)}")
    return AnswerPair(_with_system(raw, turns), chosen[-1], rejected[-1])


def _joined(prompt: list[Any], shared: list[Any]) -> list[Any]:
    """Return the turns of a prompt and of the conversations that follow or repeat it.

    Raises RowProblem if the conversations do neither.
    """
    if _holds(shared, prompt):
        return shared
    if _holds(prompt, shared):
        return prompt
    begins = _said(shared[0])[0]
    only_system = all(_said(turn)[0] == "system" for turn in prompt)
    if begins == "assistant" or (only_system and begins != "system"):
        return [*prompt, *shared]
    raise RowProblem(
        f"the prompt ends with {shown(_said(prompt[-1])[1])[:60]}, "
        f"and chosen and rejected begin with {shown(_said(shared[0])[1])[:60]}; "
        "expected conversations that repeat the prompt or follow it: remove the prompt, or leave "
        "only what follows it in chosen and rejected"
    )


def _holds(turns: list[Any], part: list[Any]) -> bool:
    """Return True if `part` is a run of `turns`."""
    all_said, said = list(map(_said, turns)), list(map(_said, part))
    places = range(len(all_said) - len(said) + 1)
    return any(all_said[place : place + len(said)] == said for place in places)


def _best_and_worst(raw: RawFields, answers: Any) -> tuple[Any, Any]:
    """Return the best and the worst of ranked answers.

    `ranks` (1 is best) or `scores` (higher is better) order them, else their position.
    """
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowProblem("the ranked answers are not a list of two or more")
    name = next((name for name in RANKS if isinstance(raw.get(name), list)), None)
    values = raw[name] if name else None
    if name is None and all(isinstance(answer, dict) for answer in answers):
        name = next((name for name in OWN_RANKS if all(name in answer for answer in answers)), None)
        values = [answer[name] for answer in answers] if name else None
    answers = list(map(_answer_text, answers))
    if name is None or values is None:
        return answers[0], answers[-1]
    numbers = [number for value in values if (number := _number(value)) is not None]
    if len(values) != len(answers) or len(numbers) != len(values):
        raise RowProblem(
            f"{name}: {len(values)} values for {len(answers)} answers; expected a number for each"
        )
    order = sorted(range(len(answers)), key=lambda index: OWN_RANKS[name] * numbers[index])
    if numbers[order[0]] == numbers[order[-1]]:
        raise Tie(f"{name}: all answers rank the same")
    return answers[order[0]], answers[order[-1]]


def _answer_text(answer: Any) -> Any:
    """Return the text of a ranked answer that is an object beside its rank, or the answer."""
    if not isinstance(answer, dict) or not answer.keys().isdisjoint(("content", "value")):
        return answer
    key = next((key for key in (*COMPLETION, "text") if isinstance(answer.get(key), str)), None)
    return answer if key is None else answer[key]


def _number(value: Any) -> float | None:
    """Return a number that can be ordered, also of a table of texts; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    with suppress(ValueError, OverflowError):
        return None if isnan(found := float(value)) else found
    return None


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
