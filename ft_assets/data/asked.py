"""The prompts of a row: what it asks before each answer, and each user turn alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

from ft_assets.data.texts import Text, parsed
from ft_assets.rows.types import TextRow

ASKING = ("user", "text")
DISTINCTIVE = 3  # units; a shorter prompt in the middle of a chat is a greeting or "go on"


@dataclass(frozen=True, eq=False)
class Prompt:
    """Something that a row asks.

    `shingles` are those of its turns. `final`: before the row's last answer. `key` is the text
    with the roles of its turns.
    """

    text: Text
    shingles: frozenset[int]
    key: str
    final: bool = False


@dataclass(frozen=True, eq=False)
class Asked:
    """The turns of a row, and the answers that a preference has besides."""

    turns: list[tuple[str, Text, frozenset[int]]]  # role, text, shingles
    answers: list[Text]
    end: int  # turns before the judged answer

    @cached_property
    def whole(self) -> Prompt:
        """The whole context before the judged answer."""
        return self._prompt(self.end, final=True)

    @cached_property
    def users(self) -> Prompt:
        """The user turns of the context."""
        return self._prompt(self.end, users=True, final=True)

    def contexts(self) -> Iterator[Prompt]:
        """Yield the context before each assistant turn of the context, whole and users only."""
        for index, (role, _, _) in enumerate(self.turns[: self.end]):
            if role == "assistant" and index:
                yield self._prompt(index)
                yield self._prompt(index, users=True)

    def user_turns(self) -> list[Prompt]:
        """Return each user turn of the context alone."""
        return [
            Prompt(text, shingles, text.joined)
            for role, text, shingles in self.turns[: self.end]
            if role in ASKING
        ]

    def texts(self) -> list[Text]:
        """Return all texts, answers included."""
        return [text for _, text, _ in self.turns] + self.answers

    def _prompt(self, end: int, users: bool = False, final: bool = False) -> Prompt:
        chosen = [turn for turn in self.turns[:end] if not users or turn[0] in ASKING]
        if len(chosen) == 1:
            (_, text, shingles), *_ = chosen
        else:
            text = reduce(add, (one for _, one, _ in chosen), parsed(""))
            shingles = frozenset[int]().union(*(one for _, _, one in chosen))
        said = [(role, one.joined) for role, one, _ in chosen]
        key = " ".join(words for _, words in said) if users else repr(said)
        return Prompt(text, shingles, key, final)


def asked(row: TextRow) -> Asked:
    """Return the comparable form of a row of any side."""
    turns: list[tuple[str, Text, frozenset[int]]] = []
    for turn in row["messages"]:
        text = parsed(turn["content"])
        turns.append((turn["role"], text, text.shingles()))
    answers = [parsed(one) for one in (row.get("chosen"), row.get("rejected")) if one]
    judged = turns[-1][0] == "assistant" and not answers
    return Asked(turns, answers, len(turns) - judged)
