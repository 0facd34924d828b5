"""What a raw row means: the shapes that data sets come in, each turned into messages. No file is read here.

Conversations: `messages` (role/content), ShareGPT (`conversations` of from/value), Alpaca (instruction/input/output and
its aliases), prompt/completion (texts or messages), a plain text. Preferences: prompt/chosen/rejected as texts or
messages, whole conversations that share their beginning, ShareGPT pairs, ranked answers; labelled answers become pairs
in kto.py. Without a name (`data.format`) the keys of each row decide; with one exactly its keys are read. A row of no
known shape says which keys it has.
"""

from typing import Any

from ft_assets.data.messages import RowProblem, spelled

PROMPT = ("prompt", "instruction", "question", "query", "input", "text")
COMPLETION = ("completion", "output", "response", "answer", "target")
CONTEXT = ("input", "context")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
RANKED = ("responses", "completions", "answers")
MEDIA = ("images", "videos", "audios")
# What the named formats read: (keys that must be there, keys that may be).
BESIDE = ("system", "system_prompt")
NAMED = {
    "messages": (("messages",), BESIDE),
    "sharegpt": (("conversations",), BESIDE),
    "alpaca": (("instruction", "output"), ("input", "history", *BESIDE)),
    "prompt_completion": (("prompt", "completion"), ("history", *BESIDE)),
    "text": (("text",), ()),
}
NAMED_PREFERENCES = {
    "preference": (("chosen", "rejected"), ("prompt", "messages", "history", *BESIDE)),
    "sharegpt_preference": (("conversations", "chosen", "rejected"), BESIDE),
    "ranked": (
        (),
        (
            "prompt",
            "messages",
            "history",
            *RANKED,
            "ranks",
            "rank",
            "scores",
            "score",
            "rewards",
            *BESIDE,
        ),
    ),
    "kto": (("chosen", "rejected"), ("messages",)),  # as kto.py leaves it
}


def renamed(raw: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the row with the user's columns under our names (`data.columns`: {ours: theirs}). Raises RowProblem."""
    missing = [theirs for theirs in columns.values() if theirs not in raw]
    if missing:
        raise RowProblem(
            f"has no column {missing[0]!r} of data.columns; it has {', '.join(sorted(raw))}"
        )
    taken = set(columns.values())
    return {key: value for key, value in raw.items() if key not in taken} | {
        ours: raw[theirs] for ours, theirs in columns.items()
    }


def conversation_turns(raw: dict[str, Any], format: str | None = None) -> list[Any]:
    """Return the turns of a conversation row, each {"role", "content"} as far as that is known. Raises RowProblem."""
    _text_only(raw)
    raw = _only(raw, format, NAMED)
    if format == "text":
        return [{"role": "text", "content": raw["text"]}]
    key = _conversation_key(raw)
    if key is not None:
        return [*_system(raw), *map(spelled, raw[key])]
    if format in ("messages", "sharegpt"):
        name = NAMED[format][0][0]
        raise RowProblem(
            f"{name}: is a {type(raw[name]).__name__}; expected a list of turns (data.format: {format})"
        )
    prompt, completion = _first(raw, PROMPT), _first(raw, COMPLETION)
    if prompt is None or completion is None or prompt == completion:
        texts = (
            " (a plain text is trained on only where data.format says so: {train: text})"
            if prompt == "text"
            else ""
        )
        raise RowProblem(
            f"has the keys {', '.join(sorted(raw)) or '(none)'}; expected messages, conversations, instruction/output or prompt/completion"
            f" (data.columns names other columns){texts}"
        )
    return [
        *_system(raw),
        *_history(raw),
        *_prompt_turns(raw, prompt),
        *_answer_turns(raw[completion]),
    ]


def preference_turns(raw: dict[str, Any], format: str | None = None) -> tuple[list[Any], Any, Any]:
    """Return (the prompt's turns, the chosen answer, the rejected one). Raises RowProblem."""
    _text_only(raw)
    if format != "ranked" and "chosen" not in raw and isinstance(raw.get("label"), bool):
        raise RowProblem(
            "is one answer with a label (KTO); DPO needs a chosen and a rejected answer to the same prompt"
        )
    raw = _only(raw, format, NAMED_PREFERENCES)
    if format == "ranked" and not any(key in raw for key in RANKED):
        raise RowProblem(
            f"has no {', '.join(RANKED)}; it has the keys {', '.join(sorted(raw))} (data.format: ranked)"
        )
    if "chosen" not in raw and (ranked := next((raw[key] for key in RANKED if key in raw), None)):
        chosen, rejected = _ranked(raw, ranked)
    else:
        missing = [key for key in ("chosen", "rejected") if key not in raw]
        if missing:
            raise RowProblem(
                f"{missing[0]}: is missing; the row has the keys {', '.join(sorted(raw))}"
            )
        chosen, rejected = raw["chosen"], raw["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _shared_prefix(
            raw, [spelled(turn) for turn in chosen], [spelled(turn) for turn in rejected]
        )
    return _preference_prompt(raw), _answer("chosen", chosen), _answer("rejected", rejected)


def _only(
    raw: dict[str, Any],
    format: str | None,
    named: dict[str, tuple[tuple[str, ...], tuple[str, ...]]],
) -> dict[str, Any]:
    """Return what a named format reads of a row; nothing is left out where none is named."""
    if format is None:
        return raw
    needed, beside = named[format]
    missing = [key for key in needed if raw.get(key) is None]
    if missing:
        raise RowProblem(
            f"{missing[0]}: is missing; the row has the keys {', '.join(sorted(raw)) or '(none)'} (data.format: {format})"
        )
    return {key: value for key, value in raw.items() if key in needed or key in beside}


def _text_only(raw: dict[str, Any]) -> None:
    if media := next((key for key in MEDIA if raw.get(key)), None):
        raise RowProblem(f"{media}: cannot be trained on; only text is read")


def _conversation_key(raw: dict[str, Any]) -> str | None:
    return next((name for name in CONVERSATIONS if isinstance(raw.get(name), list)), None)


def _preference_prompt(raw: dict[str, Any]) -> list[Any]:
    key = _conversation_key(raw)
    if key is not None:
        return [*_system(raw), *map(spelled, raw[key])]
    prompt = _first(raw, PROMPT)
    if prompt is None:
        raise RowProblem(f"has no prompt; it has the keys {', '.join(sorted(raw))}")
    return [*_system(raw), *_history(raw), *_prompt_turns(raw, prompt)]


def _first(raw: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if raw.get(name) not in (None, "", [])), None)


def _system(raw: dict[str, Any]) -> list[dict[str, Any]]:
    key = next((name for name in BESIDE if raw.get(name) is not None), None)
    if key is None or (isinstance(raw[key], str) and not raw[key].strip()):
        return []
    return [{"role": "system", "content": raw[key]}]


def _history(raw: dict[str, Any]) -> list[dict[str, Any]]:
    pairs = raw.get("history")
    if pairs in (None, "", []):
        return []
    if not isinstance(pairs, list | tuple):
        raise RowProblem(
            f"history: is a {type(pairs).__name__}; expected a list of pairs of question and answer"
        )
    turns: list[dict[str, Any]] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowProblem(f"history[{index}]: expected a pair of question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _prompt_turns(raw: dict[str, Any], key: str) -> list[Any]:
    value = raw[key]
    if isinstance(value, list):
        return [spelled(turn) for turn in value]
    context = next(
        (
            raw[name]
            for name in CONTEXT
            if name != key and isinstance(raw.get(name), str) and raw[name].strip()
        ),
        None,
    )
    if (
        key in ("instruction", "question", "query")
        and context is not None
        and isinstance(value, str)
    ):
        return [{"role": "user", "content": f"{value}\n{context}"}]
    return [{"role": "user", "content": value}]


def _answer_turns(value: Any) -> list[Any]:
    return (
        [spelled(turn) for turn in value]
        if isinstance(value, list)
        else [{"role": "assistant", "content": value}]
    )


def _answer(name: str, value: Any) -> Any:
    """Return the text of an answer, which may be a turn or a list of one."""
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


def _shared_prefix(
    raw: dict[str, Any], chosen: list[Any], rejected: list[Any]
) -> tuple[list[Any], Any, Any]:
    """Split two whole conversations into what they share and their last answers."""
    if len(chosen) == len(rejected) == 1:
        return _preference_prompt(raw), _answer("chosen", chosen), _answer("rejected", rejected)
    if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
        index = next(
            (
                i
                for i, (left, right) in enumerate(zip(chosen, rejected, strict=False))
                if left != right
            ),
            min(len(chosen), len(rejected)),
        )
        raise RowProblem(
            f"chosen and rejected part at messages[{index}]; expected the same conversation but for the last answer"
        )
    return (
        [*_system(raw), *chosen[:-1]],
        _answer("chosen", chosen[-1]),
        _answer("rejected", rejected[-1]),
    )


def _ranked(raw: dict[str, Any], answers: Any) -> tuple[Any, Any]:
    """Return the best and the worst of ranked answers: `ranks` (1 is best) or `scores` (more is better), else in order."""
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowProblem("the ranked answers are not a list of two or more")
    order = range(len(answers))
    for name, best_first in (
        ("ranks", 1),
        ("rank", 1),
        ("scores", -1),
        ("score", -1),
        ("rewards", -1),
    ):
        values = raw.get(name)
        if isinstance(values, list):
            if len(values) != len(answers) or not all(map(_number, values)):
                raise RowProblem(
                    f"{name}: {len(values)} values for {len(answers)} answers; expected a number for each"
                )
            ordered = sorted(order, key=lambda index: best_first * values[index])
            if values[ordered[0]] == values[ordered[-1]]:
                raise RowProblem(f"{name}: all answers rank the same")
            return answers[ordered[0]], answers[ordered[-1]]
    return answers[0], answers[-1]


def _number(value: Any) -> bool:
    """Whether a value can be ordered: NaN cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
