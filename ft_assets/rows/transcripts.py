"""Read conversations that are one text, such as hh-rlhf's "Human: … Assistant: …".

hh-rlhf's and Glaive's form are known. `data.transcript` declares the marks of any other.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ft_assets.rows.types import RawFields

# The columns in which a known form is looked for.
COLUMNS = (
    *("chosen", "rejected", "prompt", "text", "chat", "transcript"),
    *("messages", "conversations", "conversation", "dialogue", "dialog"),
)


@dataclass(frozen=True)
class Transcript:
    """The form of a transcript. `pattern` finds a mark and has one group, a key of `roles`.

    `end` is what a tool wrote at the end of an answer.
    """

    pattern: re.Pattern[str]
    roles: Mapping[str, str]
    end: str = ""

    def turns(self, text: str) -> list[Any] | None:
        """Return the turns of a text, or None if it does not begin with a mark of this form."""
        begin = self.pattern.match(text.lstrip())
        if begin is None:
            return None
        first, *parts = self.pattern.split(text.lstrip())
        if first.strip():
            return None
        return [
            {"role": self.roles[mark], "content": said.strip().removesuffix(self.end).rstrip()}
            for mark, said in zip(parts[::2], parts[1::2], strict=True)
        ]


HH = Transcript(
    re.compile(r"(?:\A|\n\n)(Human|Assistant):"), {"Human": "user", "Assistant": "assistant"}
)
GLAIVE = Transcript(
    re.compile(r"(?:\A|\n)[ ]*(USER|ASSISTANT|FUNCTION RESPONSE):"),
    {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"},
    end="<|endoftext|>",
)


def declared(marks: Mapping[str, str]) -> Transcript:
    """Return the form that `data.transcript` declares: {role: mark}, such as {user: "### Human:"}.

    A mark may be anywhere in the text. The longest one wins.
    """
    longest_first = sorted(marks.values(), key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
    return Transcript(pattern, {mark: role for role, mark in marks.items()})


def transcribed(raw: RawFields, form: Transcript | None = None) -> RawFields:
    """Return a row with its transcripts as lists of turns.

    With a declared `form` a text of any column is a transcript if it begins with a mark. Without,
    a text of COLUMNS is one if it has turns of both sides.
    """
    found: RawFields = {}
    for name in COLUMNS if form is None else raw:
        value = raw.get(name)
        if isinstance(value, str) and (turns := _turns(value, form)):
            found[name] = turns[:-1] if _is_open(name, turns) else turns
    if not found:
        return raw
    system = raw.get("system")
    if isinstance(system, str) and "chat" in found:  # Glaive's
        found["system"] = system.strip().removeprefix("SYSTEM:").strip()
    return {**raw, **found}


def _turns(text: str, form: Transcript | None) -> list[Any] | None:
    if form is not None:
        return form.turns(text)
    known = HH if "Assistant:" in text else GLAIVE if "ASSISTANT:" in text else None
    turns = None if known is None else known.turns(text)
    return turns if turns and {turn["role"] for turn in turns} >= {"user", "assistant"} else None


def _is_open(name: str, turns: list[Any]) -> bool:
    """Return True for a prompt that ends with the mark of the answer to come."""
    return name == "prompt" and turns[-1] == {"role": "assistant", "content": ""}
