"""Check the turns of a conversation, in every spelling of a turn, one by one and in order.

A raw turn becomes a Message (rows.py). Not here: tools and tool calls (tools.py).
"""

from dataclasses import dataclass, field
from typing import Any

from ft_assets.rows.tools import tool_calls
from ft_assets.rows.turn_keys import EMPTY, NAMES, is_learnt, require_read, with_reasoning
from ft_assets.rows.types import Message, RawFields, ToolCall
from ft_assets.rows.values import RowProblem, shown, text, word

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt"), "assistant"),
    **dict.fromkeys(("bard", "output", "response", "answer"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result"), "tool"),
}
OURS = frozenset(("system", "user", "assistant", "tool"))
THEIRS = frozenset(("from", "value"))
# ShareGPT's roles of a turn that has only calls.
CALLS = ("function_call", "tool_call", "tool_calls")


def spelled(turn: Any) -> Any:
    """Return a turn with our names for keys and roles, and its texts joined.

    What is not a turn is returned unchanged: `checked` rejects it.
    """
    if not isinstance(turn, dict):
        return turn
    if turn.keys().isdisjoint(THEIRS) and isinstance(turn.get("content"), str):
        role = turn.get("role")
        if isinstance(role, str) and role in OURS:  # as most turns are
            return turn
    role, content = (_named(turn, *names) for names in NAMES)
    turn = {key: value for key, value in turn.items() if key not in THEIRS}
    if isinstance(content, list) and content and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str):
        return {**turn, "role": role, "content": content}
    role = role.strip()
    if role.lower() in CALLS:
        if turn.get("tool_calls"):
            raise RowProblem(f"a turn has the role {role} and tool_calls; expected one of them")
        return {**turn, "role": "assistant", "content": None, "tool_calls": content}
    return {**turn, "role": ROLES.get(role.lower(), role), "content": content}


def _named(turn: RawFields, ours: str, theirs: str) -> Any:
    value, other = turn.get(ours), turn.get(theirs)
    if value is not None and other is not None and value != other:
        raise RowProblem(
            f"a turn has {ours} ({shown(value)[:60]}) and {theirs} ({shown(other)[:60]}); "
            "expected one of them"
        )
    return other if value is None else value


def _is_text(part: Any) -> bool:
    """Return True for a part of a content that is only text."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        return False
    others = part.keys() - {"type", "text", "cache_control"}
    return part.get("type") == "text" and all(part[key] in EMPTY for key in others)


def turns_of(listed: list[Any]) -> list[Any]:
    """Return the turns of a list. An exchange, {"human": …, "assistant": …}, is several turns."""
    return [spelled(turn) for given in listed for turn in _exchange(given)]


def _exchange(turn: Any) -> list[Any]:
    if not isinstance(turn, dict) or not turn.keys().isdisjoint(("role", "from")):
        return [turn]
    said = {key: value for key, value in turn.items() if str(key).lower() in ROLES}
    others = (value for key, value in turn.items() if key not in said)
    if not said or not all(value in EMPTY for value in others):
        return [turn]
    given = {key: value for key, value in said.items() if value not in EMPTY}
    return [{"role": key, "content": value} for key, value in given.items()]


def checked(name: str, turns: list[Any]) -> list[Message]:
    """Return the turns as messages, each valid and in a valid order.

    User turns in a row become one turn, with a line break between their texts. An assistant turn
    before the first user turn, such as a greeting, is context only. Raises RowProblem with the
    index of the first wrong turn.
    """
    if not turns:
        raise RowProblem(f"{name}: is empty")
    order = _Order()
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        message = _message(f"{name}[{index}]", spelled(turn))
        last = messages[-1]["role"] if messages else None
        if last == message["role"] == "user":
            messages[-1]["content"] += f"\n{message['content']}"
            continue
        if message["role"] == "assistant" and last in (None, "system"):
            message = _opening(f"{name}[{index}]", message)
        order.add(f"{name}[{index}]", message, first=index == 0)
        messages.append(message)
    if all(message["role"] in ("system", "assistant") for message in messages):
        raise RowProblem(f"{name}: has no user turn; expected one before the assistant's answer")
    last = messages[-1]["role"]
    if last == "system":
        raise RowProblem(f"{name}: only a system turn; expected a user turn")
    if last == "tool" and order.open_calls:
        raise RowProblem(
            f"{name}[{len(messages) - 1}]: {len(order.results)} results; "
            f"expected {len(order.calls)}, one a call"
        )
    return messages


def answer(name: str, value: Any) -> Message:
    """Return an answer of a preference: a text, a turn, or a list of one turn. Raises RowProblem.

    All keys of a turn are checked as in a conversation.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    turn = spelled(value) if isinstance(value, dict) else {"content": value}
    if turn.get("role") not in (None, "assistant"):
        raise RowProblem(f"{name}: is the turn of the {turn['role']!r}; expected the assistant's")
    message = _message(name, {**turn, "role": "assistant"})
    if "tool_calls" in message:
        raise RowProblem(f"{name}: has tool calls; the two answers of a preference are texts")
    if message.get("train") is False:
        raise RowProblem(
            f"{name}: is not to be trained; both answers of a preference are: remove the row"
        )
    return message


def _opening(where: str, message: Message) -> Message:
    """Return the turn with which an assistant opens a conversation: it answers no prompt."""
    if "tool_calls" in message:
        raise RowProblem(
            f"{where}: the assistant opens the conversation with a tool call; "
            "expected a user turn before it"
        )
    return {**message, "train": False}


@dataclass
class _Order:
    """The order of turns: user and assistant alternate, and each call has one result."""

    expected: str = "user"
    spoken: bool = False  # there is a turn that is not the system's
    calls: list[ToolCall] = field(default_factory=list)  # of the last assistant turn
    results: list[Message] = field(default_factory=list)  # of these calls

    @property
    def open_calls(self) -> bool:
        return len(self.results) < len(self.calls)

    def add(self, where: str, message: Message, first: bool) -> None:
        """Add the next turn. Raises RowProblem if it cannot come here."""
        role = message["role"]
        if role == "system":
            if not first:
                raise RowProblem(f"{where}: a system turn; expected it first or not at all")
        elif role == "tool":
            self._add_result(where, message)
        elif role == "assistant" and self.expected == "user" and not self.spoken:
            pass  # it opens the conversation
        elif role != self.expected:
            raise RowProblem(f"{where}: role {shown(role)}; expected {self._expectation()}")
        else:
            self.calls = message.get("tool_calls", []) if role == "assistant" else []
            self.results = []
            self.expected = "assistant" if role == "user" else "tool" if self.calls else "user"
        self.spoken = self.spoken or role != "system"

    def _add_result(self, where: str, message: Message) -> None:
        if not self.open_calls:
            reason = (
                f"the calls before it are {len(self.calls)} and have their results"
                if self.calls
                else "no assistant turn with tool calls before it"
            )
            raise RowProblem(f"{where}: a tool result; {reason}")
        _require_call(where, message, self.calls, self.results)
        self.results.append(message)
        self.expected = "tool" if self.open_calls else "assistant"

    def _expectation(self) -> str:
        if self.expected == "tool":
            return f"the tool's result ({len(self.results)} of {len(self.calls)} are there)"
        if self.expected == "user":
            return "'user' (turns alternate; join two answers in a row into one turn)"
        return f"{self.expected!r} (turns alternate)"


def _require_call(
    where: str, result: Message, calls: list[ToolCall], before: list[Message]
) -> None:
    """Raise RowProblem unless a tool's result belongs to a call that has no result yet."""
    given = result.get("tool_call_id")
    if given is not None:
        known = [call["id"] for call in calls if "id" in call]
        if given not in known:
            raise RowProblem(
                f"{where}: tool_call_id {given!r}; "
                f"expected one of the calls' ids: {', '.join(known) or '(they have none)'}"
            )
        if given in [other.get("tool_call_id") for other in before]:
            raise RowProblem(f"{where}: tool_call_id {given!r} has its result already")
    called = [
        call["function"]["name"] for call in calls if given is None or call.get("id") == given
    ]
    if "name" in result and result["name"] not in called:
        raise RowProblem(
            f"{where}: is the result of {result['name']!r}; "
            f"expected {' or '.join(map(repr, called))}, which was called"
        )


def _message(where: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(
            f"{where}: is a {type(turn).__name__}; expected an object with role and content"
        )
    role = turn.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        raise RowProblem(
            f"{where}: role {shown(role)}; "
            "expected one of system, user, assistant, tool (or human, gpt, …)"
        )
    require_read(where, turn, role)
    calls = tool_calls(where, turn)
    if calls and role != "assistant":
        raise RowProblem(
            f"{where}: the {role}'s turn has tool calls; expected them on an assistant turn"
        )
    content = "" if calls and turn.get("content") is None else turn.get("content")
    content = _text(where, content, empty=bool(calls) or role == "tool")
    thought = with_reasoning(where, turn, role, content)
    message: Message = {"role": role, "content": content if thought is None else thought}
    if thought is not None or turn.get("reasoned") is True:
        message["reasoned"] = True
    if not is_learnt(where, turn, role):
        message["train"] = False
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        if turn.get("tool_call_id") is not None:
            message["tool_call_id"] = word(f"{where}.tool_call_id", turn["tool_call_id"])
        name = turn.get("name") or turn.get("tool_name")
        if name is not None:
            message["name"] = word(f"{where}.name", name)
    return message


def _text(where: str, content: Any, empty: bool) -> str:
    """Return the text of a turn. Raises RowProblem, which names a part that is not text."""
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not _is_text(part):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                keys = f" with {', '.join(map(str, part))}" if isinstance(part, dict) else ""
                raise RowProblem(
                    f"{where}.content[{index}]: is {shown(kind)}{keys} ({shown(part)[:80]}); "
                    "only parts of the type 'text' are read, with their text"
                )
    return text(where, content, empty)
