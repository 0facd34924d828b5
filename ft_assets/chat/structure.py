"""Prove that a template drops no turn, call or tool, with words that stand nowhere else: a row's own words could stand in
the text by chance. Done once for each sequence of roles.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ft_assets.chat.proofs import Messages, ProofFailed, prove_contents
from ft_assets.models.chat_template import QUESTION

TOOL = {
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
CALL = {
    "type": "function",
    "function": {
        "name": "zqfunction",
        "arguments": {"zqtext": 'zq "quoted" value', "zqflag": True, "zqlist": ["zqone"]},
    },
}
PROBE = (
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "zqresult", "name": "zqfunction"},
)


class Structures:
    """Remembers what was found of each sequence of roles; `write` renders messages: (messages, tools, generation prompt) -> text."""

    def __init__(self, write: Callable[[Any, Any, bool], str]) -> None:
        self._write = write
        self._problems: dict[Any, str | None] = {}

    def prove(self, messages: Messages, tools: bool, generation_prompt: bool = False) -> None:
        """Raise ProofFailed if the template drops a turn of such a conversation, or its tools."""
        key = (
            tuple(
                (turn["role"], bool(turn["content"].strip()), len(turn.get("tool_calls", ())))
                for turn in messages
            ),
            tools,
            generation_prompt,
        )
        if key not in self._problems:
            probe = [_probed(turn, index) for index, turn in enumerate(messages)]
            try:
                text = self._write(probe, [TOOL] if tools else None, generation_prompt)
                prove_contents(text, probe, [TOOL] if tools else None)
                self._problems[key] = None
            except ProofFailed as problem:
                self._problems[key] = _in_general(str(problem))
        if (problem := self._problems[key]) is not None:
            raise ProofFailed(problem)


def _probed(turn: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a message with words in it that no template and no other message has."""
    probe = {**turn, "content": f"zqturn{index}end" if turn["content"].strip() else turn["content"]}
    if calls := turn.get("tool_calls"):
        probe["tool_calls"] = [
            {
                **call,
                "function": {
                    "name": "zqfunction",
                    "arguments": {"zqtext": f"zqvalue{index}number{number}"},
                },
            }
            for number, call in enumerate(calls)
        ]
    return probe


def _in_general(problem: str) -> str:
    """Return a problem of probed messages in words about any messages of the same roles."""
    problem = re.sub(r", 'zqturn\d+end'", "", problem)
    return re.sub(
        r"the (?:description of the |parameter \w+ of the )?tool zqfunction",
        "the tools, or a part of what they are",
        problem,
    )
