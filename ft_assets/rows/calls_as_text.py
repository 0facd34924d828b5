"""Read tool calls and tool results that stand in the text of a turn.

Two forms are read: Hermes' and Qwen's tags (<tool_call>, <tool_response>), and Glaive's
<functioncall>. The calls become those of the turn, because each template has its own syntax.
"""

import ast
import json
import re
from itertools import pairwise
from typing import Any

from ft_assets.rows.types import RawFields
from ft_assets.rows.values import RowProblem, shown

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
FUNCTION_CALL = re.compile(r"<functioncall>(.*)", re.DOTALL)
RESULT = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
RESULTS_ONLY = re.compile(r"(?:\s*<tool_response>.*?</tool_response>\s*)+", re.DOTALL)
QUOTED = re.compile(r"""("arguments"\s*:\s*)'(.*)'""", re.DOTALL)  # Glaive's JSON within quotes


def expanded(turns: list[Any]) -> list[Any]:
    """Return the turns with the calls and results of their texts. Raises RowProblem.

    A turn with several results becomes one turn a result.
    """
    parts: list[Any] = []
    for index, turn in enumerate(turns):
        parts += _parts(index, turn, parts[-1] if parts else None)
    return parts


def _parts(index: int, turn: Any, before: Any) -> list[Any]:
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, str) or "<" not in content:
        return [turn]
    if turn["role"] == "assistant" and not turn.get("tool_calls"):
        return [_with_calls(f"turn {index}", turn, content)]
    follows_call = isinstance(before, dict) and bool(before.get("tool_calls"))
    may_be_result = turn["role"] == "tool" or (turn["role"] == "user" and follows_call)
    if may_be_result and RESULTS_ONLY.fullmatch(content):
        return [
            {**turn, "role": "tool", "content": result.strip()}
            for result in RESULT.findall(content)
        ]
    return [turn]


def _with_calls(where: str, turn: RawFields, content: str) -> RawFields:
    found = list((CALL if "<tool_call>" in content else FUNCTION_CALL).finditer(content))
    if not found:
        return turn
    between = [content[one.end() : two.start()] for one, two in pairwise(found)]
    if rest := "".join([*between, content[found[-1].end() :]]).strip():
        raise RowProblem(
            f"{where}: has the text {rest[:60]!r} after a tool call; "
            "expected an answer's text before its calls"
        )
    calls = [_call(where, match[1].strip()) for match in found]
    return {**turn, "content": content[: found[0].start()].rstrip(), "tool_calls": calls}


def _call(where: str, written: str) -> Any:
    """Return a call that is written as JSON, or as a Python dict."""
    for candidate in (written, QUOTED.sub(r"\1\2", written)):
        for read in (json.loads, ast.literal_eval):
            try:
                call = read(candidate)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(call, dict) and isinstance(call.get("name"), str):
                return call
    raise RowProblem(
        f"{where}: the tool call {shown(written)[:80]} is neither JSON nor a Python dict "
        "with name and arguments"
    )
