"""Check the turns of a conversation, in every spelling of a turn, one by one and in order.

A raw turn becomes a Message (rows.py). Not here: tools and tool calls (tools.py).
"""

from dataclasses import dataclass, field
from typing import Any

from ft_assets.rows.tools import tool_calls
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
# ShareGPT's roles of a turn that has only calls.
CALLS = ("function_call", "tool_call", "tool_calls")
NAMES = (("role", "from"), ("content", "value"))
REASONING = ("reasoning_content", "reasoning", "thinking")


def spelled(turn: Any) -> Any:
    """Return a turn with our names for keys and roles, and its texts joined.

    What is not a turn is returned unchanged: `checked` rejects it.
    """
    if not isinstance(turn, dict):
        return turn
    role, content = (
        turn.get(ours) if turn.get(ours) is not None else turn.get(theirs) for ours, theirs in NAMES
    )
    if isinstance(content, list) and content and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str):
        return {**turn, "role": role, "content": content}
    if role.lower() in CALLS:
        return {**turn, "role": "assistant", "content": None, "tool_calls": content}
    return {**turn, "role": ROLES.get(role.lower(), role), "content": content}


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


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
    if hidden := next((key for key in REASONING if turn.get(key)), None):
        raise RowProblem(
            f"{where}: {hidden} would be lost; write it into content as the model's template does, "
            "or remove the key"
        )
    calls = tool_calls(where, turn)
    if calls and role != "assistant":
        raise RowProblem(
            f"{where}: the {role}'s turn has tool calls; expected them on an assistant turn"
        )
    content = "" if calls and turn.get("content") is None else turn.get("content")
    message: Message = {"role": role, "content": text(where, content, empty=bool(calls))}
    if not _trained(where, turn, role):
        message["train"] = False
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        if turn.get("tool_call_id") is not None:
            message["tool_call_id"] = word(f"{where}.tool_call_id", turn["tool_call_id"])
        if turn.get("name") is not None:
            message["name"] = word(f"{where}.name", turn["name"])
    return message


def _trained(where: str, turn: RawFields, role: str) -> bool:
    """Return False for an assistant turn that is context only: `train: false` or `weight: 0`.

    `weight` is OpenAI's spelling.
    """
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowProblem(f"{where}: train is {shown(train)}; expected true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowProblem(f"{where}: weight is {shown(weight)}; expected 0 or 1")
    if train is not None and weight is not None and train != bool(weight):
        raise RowProblem(f"{where}: train is {train} and weight is {weight}; expected one of them")
    given = train if train is not None else None if weight is None else bool(weight)
    if given and role != "assistant":
        raise RowProblem(
            f"{where}: the {role}'s turn is to be trained; only the assistant's answers are"
        )
    return role != "assistant" or given is not False
