"""Find the trained rows that repeat a held-out row, whatever part of it and however they do.

A trained row has several prompts: the context before each of its answers, and each user turn. Each
is compared with what the held-out rows ask. All its texts are searched for held-out answers.
Only the held-out rows are in memory.
"""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ft_assets.config import DataSettings
from ft_assets.data.asked import DISTINCTIVE, Asked, Prompt, asked
from ft_assets.data.boilerplate import Common, Rows, answer_key
from ft_assets.data.near_duplicates import NearIndex
from ft_assets.data.quotes import ENOUGH, GramIndex, PhraseIndex
from ft_assets.data.short_prompts import ShortIndex
from ft_assets.data.texts import parsed
from ft_assets.rows.types import CopyKind, TextRow

LONG_ANSWER = 30  # units; a shorter answer to several prompts is a label
MAIN = 0.5  # share of a prompt's own shingles that makes a part of it its question


class Found(NamedTuple):
    """A held-out row (`of`) that a row repeats."""

    kind: CopyKind
    of: str
    similarity: float


class LeakIndex:
    """Finds the indexed rows that a row repeats. `sides` are the indexed rows by their side."""

    def __init__(
        self,
        sides: Mapping[str, Rows],
        data: DataSettings,
        common: Common,
        answers: bool = True,
    ) -> None:
        self.side_of: dict[str, str] = {}
        self._common = common
        self._contexts: dict[str, str] = {}  # {key of a whole context: id}
        self._groups: dict[str, str] = {}
        self._family_of = dict(common.families)  # {shingle: family}
        self._families: dict[int, str] = {}  # {family: id}
        self._chats: dict[str, str] = {}  # {key of an earlier context of a chat: id}
        self._questions: dict[str, str] = {}  # {text of a question: id}
        self._near = NearIndex(data.near_duplicate) if data.near_duplicate else None
        self._short = ShortIndex(common.words, common.slots) if data.near_duplicate else None
        self._phrases = PhraseIndex() if data.quoted else None
        self._quoted = GramIndex(data.quoted or 1, common.grams)
        self._answers = GramIndex(data.quoted or 1, common.grams)
        self._answer_phrases = PhraseIndex() if data.quoted and answers else None
        for side, rows in sides.items():
            for row in rows:
                self._add(side, row)

    def _add(self, side: str, row: TextRow) -> None:
        identity, found = row["id"], asked(row)
        self.side_of.setdefault(identity, side)
        self._contexts.setdefault(found.whole.key, identity)
        self._groups.setdefault(row["group"], identity)
        for context in found.contexts():
            if self._distinctive(context):
                self._chats.setdefault(context.key, identity)
        for question in self._questions_of(found):
            if self._distinctive(question):
                self._questions.setdefault(question.text.joined, identity)
            if (family := self._family(question)) is not None:
                self._families.setdefault(family, identity)
            if self._near and self._short:
                self._near.add(identity, self._common.own(question.shingles))
                self._short.add(identity, question.text)
            if self._phrases:
                self._add_phrases(self._phrases, identity, question)
        if self._answer_phrases and found.turns[-1][0] == "assistant":
            self._add_answers(self._answer_phrases, identity, row["messages"][-1]["content"])

    def _questions_of(self, found: Asked) -> list[Prompt]:
        """Return the whole prompt, and its user turns or its last one if they are most of it."""
        whole = self._common.own(found.whole.shingles)
        parts = [found.users, *found.user_turns()[-1:]]
        main = [
            part
            for part in parts
            if len(part.shingles - self._common.shingles) >= MAIN * len(whole)
        ]
        return list({one.text.joined: one for one in [found.whole, *main]}.values())

    def _family(self, prompt: Prompt) -> int | None:
        """Return the family of paraphrases to which most of a prompt belongs."""
        known = [self._family_of[one] for one in prompt.shingles if one in self._family_of]
        if len(known) < max(DISTINCTIVE, MAIN * len(prompt.shingles)):
            return None
        return max(set(known), key=lambda family: (known.count(family), family))

    def _add_phrases(self, index: PhraseIndex, identity: str, question: Prompt) -> None:
        index.add_text(identity, question.text)
        if not self._quoted.add(identity, question.text) and self._is_question(question):
            index.add_phrase(identity, question.text)

    def _is_question(self, prompt: Prompt) -> bool:
        """Return True if a prompt that stands in another one is not just a common instruction.

        A long one that is all of a row's context is what the row asks, however common it is.
        """
        own = prompt.shingles - self._common.shingles
        alone = prompt.final and not own and len(prompt.text) >= ENOUGH
        return alone or len(own) >= MAIN * len(prompt.shingles)

    def _add_answers(self, index: PhraseIndex, identity: str, answer: str) -> None:
        for text in map(parsed, _texts_of(answer)):
            canned = answer_key(text) in self._common.answers and len(text) < LONG_ANSWER
            if len(text) >= ENOUGH and not canned and not self._answers.add(identity, text):
                index.add_phrase(identity, text)

    def __len__(self) -> int:
        return len(self.side_of)

    @property
    def slots(self) -> frozenset[int]:
        """The slots of templates that were known or found."""
        return frozenset(self._short.slots) if self._short else frozenset()

    def decided(self) -> Iterator[tuple[tuple[str, str], Found]]:
        """Yield ((side, id), found) of matches that only all rows together could decide."""
        if self._short:
            for row, of, score in self._short.decided():
                yield row, Found("one-word", of, score)

    def matches(self, row: TextRow, side: str = "", most: int | None = None) -> Iterator[Found]:
        """Yield what a row of a side repeats, the surest kind first.

        `most` limits the candidates of near-duplicates. Ask `decided` after all rows.
        """
        found = asked(row)
        prompts = self._prompts(found)
        yield from self._equal(row, found, prompts)
        if self._near and self._short:
            for own in dict.fromkeys(self._common.own(prompt.shingles) for prompt in prompts):
                for of, score in self._near.matches(own, most):
                    yield Found("near-duplicate", of, score)
            texts = {prompt.text.joined: prompt.text for prompt in prompts}
            for text in texts.values():
                for of, score in self._short.matches((side, row["id"]), text):
                    yield Found("one-word", of, score)
            for prompt in prompts if self._families else ():
                family = self._family(prompt)
                if family is not None and family in self._families:
                    yield Found("family", self._families[family], MAIN)
        if self._phrases:
            yield from self._quotes(self._phrases, found, prompts)
        if self._answer_phrases:
            for of, score in self._answers.matches(found.texts()):
                yield Found("answer", of, score)
            for of in self._answer_phrases.quoted(found.texts()):
                yield Found("answer", of, 1.0)

    def _prompts(self, found: Asked) -> list[Prompt]:
        """Return what a row asks. Of its parts only those that are distinctive."""
        parts = [found.users, *found.contexts(), *found.user_turns()]
        return [found.whole, *(part for part in parts if self._distinctive(part))]

    def _equal(self, row: TextRow, found: Asked, prompts: list[Prompt]) -> Iterator[Found]:
        whole = found.whole.key
        if (of := self._contexts.get(whole)) is not None:
            yield Found("same-prompt", of, 1.0)
        if (of := self._groups.get(row["group"])) is not None:
            yield Found("same-group", of, 1.0)
        earlier = (self._contexts.get(prompt.key) for prompt in prompts if not prompt.final)
        for of in (*earlier, self._chats.get(whole)):
            if of is not None:
                yield Found("same-chat", of, 1.0)
        for prompt in prompts:
            question = prompt.text.joined
            if self._distinctive(prompt) and (of := self._questions.get(question)) is not None:
                yield Found("same-prompt", of, 1.0)

    def _quotes(self, phrases: PhraseIndex, found: Asked, prompts: list[Prompt]) -> Iterator[Found]:
        texts = found.texts()
        for of, score in self._quoted.matches(texts):
            yield Found("quoted", of, score)
        for of in phrases.quoted(texts):
            yield Found("quoted", of, 1.0)
        for prompt in prompts:
            if self._is_question(prompt):
                for of in phrases.quoting(prompt.text):
                    yield Found("contained", of, 1.0)

    def _distinctive(self, prompt: Prompt) -> bool:
        return len(prompt.text) >= DISTINCTIVE and not prompt.shingles <= self._common.shingles


def _texts_of(answer: str) -> Iterator[str]:
    """Yield the texts of an answer: those in its JSON, whose keys and labels are no texts."""
    try:
        value = json.loads(answer) if answer.lstrip()[:1] in ("{", "[") else answer
    except (ValueError, RecursionError):
        value = answer
    left = [value]
    while left:
        match left.pop():
            case str(text):
                yield text
            case dict(members):
                left += members.values()
            case list(members):
                left += members
