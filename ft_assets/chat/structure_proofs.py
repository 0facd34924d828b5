"""Prove that a template drops no turn, call or tool, with words that no template has.

The words of a row could be in the text by chance. Each sequence of roles is proven once.
"""

import re
from collections.abc import Callable

from ft_assets.chat.row_proofs import Messages, ProofFailed, Tools, prove_contents
from ft_assets.models.chat_template import QUESTION
from ft_assets.rows.types import Message, Tool, ToolCall

TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "zqfunction",
        "description": "zqdescription",
        "parameters": {
            "type": "object",
            "properties": {
                "zqtext": {"type": "string", "description": "zqmeaning"},
                "zqflag": {"type": "boolean", "description": "zqswitch"},
                "zqlist": {"type": "array", "items": {"type": "string"}, "description": "zqnames"},
            },
            "required": ["zqtext"],
        },
    },
}
CALL: ToolCall = {
    "type": "function",
    "function": {
        "name": "zqfunction",
        "arguments": {"zqtext": 'zq "quoted" value', "zqflag": True, "zqlist": ["zqone"]},
    },
}
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "zqresult", "name": "zqfunction"},
)
# Role, whether there is content, and the number of calls of each turn; tools; generation prompt.
_Shape = tuple[tuple[tuple[str, bool, int], ...], bool, bool]


class Structures:
    """Proves each sequence of roles once and remembers the result.

    `write` renders messages: (messages, tools, generation prompt) -> text.
    """

    def __init__(self, write: Callable[[Messages, Tools, bool], str]) -> None:
        self._write = write
        self._problems: dict[_Shape, str | None] = {}

    def prove(self, messages: Messages, tools: bool, generation_prompt: bool = False) -> None:
        """Raise ProofFailed if the template drops a turn of such a conversation, or its tools."""
        turns = tuple(
            (turn["role"], bool(turn["content"].strip()), len(turn.get("tool_calls", ())))
            for turn in messages
        )
        shape = (turns, tools, generation_prompt)
        if shape not in self._problems:
            self._problems[shape] = self._problem(messages, tools, generation_prompt)
        problem = self._problems[shape]
        if problem is not None:
            raise ProofFailed(problem)

    def _problem(self, messages: Messages, tools: bool, generation_prompt: bool) -> str | None:
        probe = [_probed(turn, index) for index, turn in enumerate(messages)]
        offered = [TOOL] if tools else None
        try:
            prove_contents(self._write(probe, offered, generation_prompt), probe, offered)
        except ProofFailed as problem:
            return _in_general(str(problem))
        return None


def _probed(turn: Message, index: int) -> Message:
    """Return a message with words that no template and no other message has."""
    probe = turn.copy()
    if turn["content"].strip():
        probe["content"] = f"zqturn{index}end"
    calls = turn.get("tool_calls")
    if calls:
        probe["tool_calls"] = [_probed_call(call, index, n) for n, call in enumerate(calls)]
    return probe


def _probed_call(call: ToolCall, index: int, number: int) -> ToolCall:
    arguments = {"zqtext": f"zqvalue{index}number{number}"}
    return {**call, "function": {"name": "zqfunction", "arguments": {**arguments}}}


def _in_general(problem: str) -> str:
    """Return a problem of probed messages in words about any messages of the same roles."""
    problem = re.sub(r", 'zqturn\d+end'", "", problem)
    return re.sub(
        r"the (?:description of the |parameter \w+ of the )?tool zqfunction",
        "the tools, or a part of what they are",
        problem,
    )
