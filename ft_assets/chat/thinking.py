"""Find how a chat template writes the reasoning of an answer, and the parts of such an answer.

A row has reasoning in <think> tags before the answer. Some templates read it from there, others
from a key of the turn, and write it between markers of their own.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ft_assets.models.chat_template import ANSWER, QUESTION
from ft_assets.rows.types import Message

OPEN, CLOSE, THOUGHT = "<think>", "</think>", "zqthought"
KEYS = ("reasoning_content", "reasoning", "thought")  # transformers copies the first to `thinking`
Render = Callable[[Sequence[Any], bool], str | None]  # (turns, generation prompt) -> text


@dataclass(frozen=True)
class Thinking:
    """The way in which a template writes reasoning.

    `key`: the key of a turn from which it is read, or empty if from the content. `opened`,
    `closed`: the texts between the generation prompt and the reasoning, and between reasoning and
    answer. `after`: the text behind the answer. `opened` is None if the generation prompt asks for
    an answer without reasoning.
    """

    key: str
    opened: str | None
    closed: str
    after: str

    def seen(self, turn: Message) -> Message:
        """Return a turn with its reasoning where the template reads it."""
        parts = split(turn)
        if parts is None or not self.key:
            return turn
        thought, answer = parts
        return {**turn, "content": answer, self.key: thought}  # type: ignore[misc]

    def is_in(self, text: str, thought: str, answer: str) -> bool:
        """Return True if a text is reasoning and answer with their markers, and nothing else.

        The text may end before the end of `after`, at a token at which generation stops.
        """
        parts = [part.strip() for part in (self.opened or "", thought, self.closed, answer)]
        whole = re.match(r"\s*".join(["", *map(re.escape, parts), ""]), text)
        return whole is not None and self.after.lstrip().startswith(text[whole.end() :].rstrip())


def split(turn: Message) -> tuple[str, str] | None:
    """Return (reasoning, answer) of a turn, or None if it has no reasoning."""
    head, closed, answer = turn["content"].partition(CLOSE)
    opened = head.lstrip().startswith(OPEN)
    if turn["role"] != "assistant" or not closed or not (opened or turn.get("reasoned")):
        return None
    thought = head.strip().removeprefix(OPEN).strip()
    return (thought, answer.strip()) if thought else None


def learn(render: Render, template: str) -> Thinking | None:
    """Return the way in which a template writes reasoning, or None if it drops it."""
    asked = [{"role": "user", "content": QUESTION}]
    context = render(asked, True)
    keys = (*KEYS, "") if CLOSE in template else KEYS
    for key in keys if context is not None else ():
        content = ANSWER if key else f"{OPEN}\n{THOUGHT}\n{CLOSE}\n\n{ANSWER}"
        turn = {"role": "assistant", "content": content, **({key: THOUGHT} if key else {})}
        text = render([*asked, turn], False)
        before, found, after = (text or "").partition(THOUGHT)
        closed, answered, after = after.partition(ANSWER)
        if found and answered and closed.strip():
            opened = before[len(context or "") :] if before.startswith(context or "") else None
            return Thinking(key, opened, closed, after)
    return None
