"""Account for every key of a turn: a key is read, or its row is rejected.

A key that nobody reads would be lost in training without a trace.
Not here: the values of the keys that are read (messages.py, tools.py).
"""

from collections.abc import Collection
from typing import Any

from ft_assets.rows.types import RawFields
from ft_assets.rows.values import RowProblem, shown, text

EMPTY: tuple[Any, ...] = (None, "", [], {})  # values of a table's column, not of a turn
NAMES = (("role", "from"), ("content", "value"))
# Whether an answer is learnt: ours, ms-swift's, Axolotl's two, and OpenAI's.
LEARNT = ("train", "loss", "training", "train_on_turn", "weight")
REASONING = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "files", "attachments")
# Where a turn comes from, and how long it is. No model sees it.
ORIGIN = (
    *("id", "uuid", "message_id", "parent_id", "turn_id", "turn_identifier", "index"),
    *("timestamp", "created_at", "create_time", "updated_at", "lang", "language"),
    *("model", "model_name", "tokens", "token_count", "num_tokens"),
)
OF_TOOLS = ("name", "tool_name", "tool_call_id")
READ = frozenset(
    ("role", "content", "tool_calls", "function_call", "reasoned", *LEARNT, *REASONING, *ORIGIN)
)
ADVICE = {
    "refusal": "write the refusal into content",
    "prefix": "complete the answer in content: the turn has only its beginning",
    "mask": "write train: true or train: false, because tools differ in what a mask means",
    "name": "write the speaker's name into content",
    **dict.fromkeys(MEDIA, "remove the row: only text is read"),
}


def require_read(where: str, turn: RawFields, role: str) -> None:
    """Raise RowProblem for a key of a turn that has a value and is not read.

    EMPTY values are no content.
    """
    for key in turn.keys() - READ:
        value = turn[key]
        if value in EMPTY or (key == "prefix" and value is False):
            continue
        if key in OF_TOOLS and role == "tool":
            continue
        advice = ADVICE.get(str(key), f"name it in data.ignore_turn_keys: [{key}]")
        raise RowProblem(
            f"{where}: the key {shown(key)} ({shown(value)[:60]}) is not read and would be lost; "
            f"{advice}, or remove the key"
        )


def without_keys(raw: RawFields, ignored: Collection[str]) -> RawFields:
    """Return a row whose turns do not have the `ignored` keys (`data.ignore_turn_keys`)."""

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(turn) if isinstance(turn, dict) else turn for turn in value]
        if isinstance(value, dict):
            return {key: part for key, part in value.items() if key not in ignored}
        return value

    return {name: kept(value) for name, value in raw.items()}


def require_no_flag(raw: RawFields) -> None:
    """Raise RowProblem for a flag of a whole row, which says that it is not to be learnt."""
    for key in LEARNT:
        value = raw.get(key)
        if value is False or (key == "weight" and value == 0 and value is not None):
            raise RowProblem(
                f"{key}: is {shown(value)} for the whole row; expected such a flag on a turn: "
                "remove the row if it is not to be trained, or the key"
            )
    if isinstance(raw.get("mask"), list) and raw["mask"]:
        raise RowProblem(
            "mask: is a list; expected train: true or train: false on each turn, because tools "
            "differ in what a mask means"
        )


def is_learnt(where: str, turn: RawFields, role: str) -> bool:
    """Return False for an assistant turn that is context only, such as `loss: false`."""
    if turn.keys().isdisjoint(LEARNT):
        return True
    given = {
        key: _flag(f"{where}: {key}", turn[key]) for key in LEARNT if turn.get(key) is not None
    }
    if len(set(given.values())) > 1:
        shown_flags = " and ".join(f"{key} is {shown(turn[key])}" for key in given)
        raise RowProblem(f"{where}: {shown_flags}; expected one of them")
    learnt = next(iter(given.values()), None)
    if learnt and role != "assistant":
        raise RowProblem(
            f"{where}: the {role}'s turn is to be trained; only the assistant's answers are"
        )
    return role != "assistant" or learnt is not False


def _flag(where: str, value: Any) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowProblem(f"{where} is {shown(value)}; expected true, false, 1 or 0")


def with_reasoning(where: str, turn: RawFields, role: str, content: str) -> str | None:
    """Return an answer's text with its reasoning before it, or None if it has none.

    The reasoning is in <think> tags, which templates of thinking models read from the content.
    """
    if turn.keys().isdisjoint(REASONING):
        return None
    given = [turn[key] for key in REASONING if turn.get(key) not in (None, "")]
    if not given:
        return None
    if role != "assistant":
        raise RowProblem(f"{where}: the {role}'s turn has reasoning; expected an assistant turn")
    if any(value != given[0] for value in given):
        raise RowProblem(f"{where}: has several kinds of reasoning; expected one of them")
    reasoning = text(f"{where}: reasoning", given[0]).strip()
    if "</think>" not in content:
        return f"<think>\n{reasoning}\n</think>\n\n{content}".rstrip()
    if reasoning not in content:
        raise RowProblem(f"{where}: has other reasoning in content; expected it once")
    return content
