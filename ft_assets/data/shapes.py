"""What a raw row means: the shapes that data sets come in, each turned into messages. No file is read here.

Conversations: `messages` (role/content), ShareGPT (`conversations` of from/value), Alpaca (instruction/input/output and
its aliases), prompt/completion (texts or messages). Preferences: prompt/chosen/rejected as texts or messages, whole
conversations that share their beginning, ShareGPT pairs, ranked answers. A row of no known shape says which keys it has.
"""

from typing import Any

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "bard", "output", "response", "answer"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
PROMPT = ("prompt", "instruction", "question", "query", "input", "text")
COMPLETION = ("completion", "output", "response", "answer", "target")
CONTEXT = ("input", "context")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")


class RowProblem(Exception):
    """Why a row cannot be used."""


def renamed(raw: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the row with the user's columns under our names (`data.columns`: {ours: theirs}). Raises RowProblem."""
    missing = [theirs for theirs in columns.values() if theirs not in raw]
    if missing:
        raise RowProblem(f"has no column {missing[0]!r} of data.columns; it has {', '.join(sorted(raw))}")
    taken = set(columns.values())
    return {key: value for key, value in raw.items() if key not in taken} | {ours: raw[theirs] for ours, theirs in columns.items()}


def conversation_turns(raw: dict[str, Any]) -> list[Any]:
    """Return the turns of a conversation row, each {"role", "content"} as far as that is known. Raises RowProblem."""
    key = next((name for name in CONVERSATIONS if isinstance(raw.get(name), list)), None)
    if key is not None:
        return [*_system(raw), *[_turn(turn) for turn in raw[key]]]
    prompt, completion = _first(raw, PROMPT), _first(raw, COMPLETION)
    if prompt is None or completion is None or prompt == completion:
        raise RowProblem(
            f"has the keys {', '.join(sorted(raw)) or '(none)'}; expected messages, conversations, instruction/output or prompt/completion"
            " (data.columns names other columns)"
        )
    return [*_system(raw), *_history(raw), *_prompt_turns(raw, prompt), *_answer_turns(raw[completion])]


def preference_turns(raw: dict[str, Any]) -> tuple[list[Any], Any, Any]:
    """Return (the prompt's turns, the chosen answer, the rejected one). Raises RowProblem."""
    if "chosen" not in raw and (ranked := next((raw[key] for key in ("responses", "completions", "answers") if key in raw), None)):
        chosen, rejected = _ranked(raw, ranked)
    else:
        if isinstance(raw.get("label"), bool):
            raise RowProblem("is one answer with a label (KTO); DPO needs a chosen and a rejected answer to the same prompt")
        missing = [key for key in ("chosen", "rejected") if key not in raw]
        if missing:
            raise RowProblem(f"{missing[0]}: is missing; the row has the keys {', '.join(sorted(raw))}")
        chosen, rejected = raw["chosen"], raw["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _shared_prefix(raw, [_turn(turn) for turn in chosen], [_turn(turn) for turn in rejected])
    return _preference_prompt(raw), _answer(chosen), _answer(rejected)


def _preference_prompt(raw: dict[str, Any]) -> list[Any]:
    key = next((name for name in CONVERSATIONS if isinstance(raw.get(name), list)), None)
    if key is not None:
        return [*_system(raw), *[_turn(turn) for turn in raw[key]]]
    prompt = _first(raw, PROMPT)
    if prompt is None:
        raise RowProblem(f"has no prompt; it has the keys {', '.join(sorted(raw))}")
    return [*_system(raw), *_history(raw), *_prompt_turns(raw, prompt)]


def _first(raw: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if raw.get(name) not in (None, "", [])), None)


def _system(raw: dict[str, Any]) -> list[dict[str, Any]]:
    value = raw.get("system", raw.get("system_prompt"))
    return [{"role": "system", "content": value}] if isinstance(value, str) and value.strip() else []


def _history(raw: dict[str, Any]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for index, pair in enumerate(raw.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowProblem(f"history[{index}]: expected a pair of question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _prompt_turns(raw: dict[str, Any], key: str) -> list[Any]:
    value = raw[key]
    if isinstance(value, list):
        return [_turn(turn) for turn in value]
    context = next((raw[name] for name in CONTEXT if name != key and isinstance(raw.get(name), str) and raw[name].strip()), None)
    if key in ("instruction", "question", "query") and context is not None:
        return [{"role": "user", "content": f"{value}\n{context}"}]
    return [{"role": "user", "content": value}]


def _answer_turns(value: Any) -> list[Any]:
    return [_turn(turn) for turn in value] if isinstance(value, list) else [{"role": "assistant", "content": value}]


def _turn(turn: Any) -> Any:
    """Return {"role", "content"} of a turn in either spelling; what it is not is said by the validation."""
    if not isinstance(turn, dict):
        return turn
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list) and content and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return {**turn, "role": ROLES.get(role.lower(), role) if isinstance(role, str) else role, "content": content}


def _answer(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return _turn(value).get("content") if isinstance(value, dict) else value


def _shared_prefix(raw: dict[str, Any], chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], Any, Any]:
    """Split two whole conversations into what they share and their last answers."""
    own = _preference_prompt(raw) if len(chosen) == len(rejected) == 1 else []
    if own:
        return own, _answer(chosen), _answer(rejected)
    if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
        index = next(
            (i for i, (left, right) in enumerate(zip(chosen, rejected, strict=False)) if left != right), min(len(chosen), len(rejected))
        )
        raise RowProblem(f"chosen and rejected part at messages[{index}]; expected the same conversation but for the last answer")
    return [*_system(raw), *chosen[:-1]], chosen[-1].get("content"), rejected[-1].get("content")


def _ranked(raw: dict[str, Any], answers: Any) -> tuple[Any, Any]:
    """Return the best and the worst of ranked answers: `ranks` (1 is best) or `scores` (more is better), else in order."""
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowProblem("the ranked answers are not a list of two or more")
    order = range(len(answers))
    for name, best_first in (("ranks", 1), ("rank", 1), ("scores", -1), ("score", -1), ("rewards", -1)):
        values = raw.get(name)
        if isinstance(values, list):
            if len(values) != len(answers) or not all(isinstance(value, int | float) for value in values):
                raise RowProblem(f"{name}: {len(values)} values for {len(answers)} answers; expected a number for each")
            ordered = sorted(order, key=lambda index: best_first * values[index])
            if values[ordered[0]] == values[ordered[-1]]:
                raise RowProblem(f"{name}: all answers rank the same")
            return answers[ordered[0]], answers[ordered[-1]]
    return answers[0], answers[-1]
