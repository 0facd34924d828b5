"""A review session: which prompt a reviewer judges next, and in which order its answers stand.

Nothing is kept but the judgements, so that a session continues where it ended. The order follows
from the reviewer's name and the prompts alone.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ft_assets.config.review import ReviewSettings
from ft_assets.errors import DataError
from ft_assets.review.judgements import (
    Judgement,
    Relations,
    Source,
    new_judgement,
    prompt_hash,
    text_hash,
)

BASE, CHAMPION = "base", "champion"


@dataclass(frozen=True)
class Item:
    """A prompt with the answer of each candidate. cluster: the key of the prompt's group."""

    prompt: Sequence[Any]
    answers: Mapping[str, str]
    cluster: str = ""
    source: Source = "held-out"

    @cached_property  # a page of many prompts asks a dozen times
    def key(self) -> str:
        """The hash of the prompt."""
        return prompt_hash(self.prompt)

    @cached_property
    def distinct(self) -> list[str]:
        """The different answers. Candidates with the same answer are a tie without a question."""
        return list(dict.fromkeys(self.answers.values()))

    @property
    def pattern(self) -> tuple[int, ...]:
        """Which candidates have the same answer, as numbers in the candidates' order."""
        texts = self.distinct
        return tuple(texts.index(text) for text in self.answers.values())

    def judged_by(self, relations: Relations) -> set[str]:
        """Return the reviewers who judged all pairs of today's answers."""
        texts = self.distinct
        found = [
            set(relations.between(self.key, first, second))
            for index, first in enumerate(texts)
            for second in texts[index + 1 :]
        ]
        return set.intersection(*found) if found else set()


@dataclass(frozen=True)
class Page:
    """What a reviewer sees: no name of a model, and nothing that was made from one.

    seal: the hash of what is shown, so that a judgement of answers that changed is refused.
    """

    key: str
    prompt: Sequence[Any]
    answers: Sequence[str]
    source: Source
    seal: str
    left: int
    done: int


def drawn(items: Sequence[Item], settings: ReviewSettings) -> list[Item]:
    """Return the prompts that are reviewed, each once, in an order that only chance decides."""
    once = {item.key: item for item in items}
    ordered = sorted(once.values(), key=lambda item: _chance(settings.seed, item.key))
    return ordered[: settings.prompts]


def _chance(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


class Session:
    """The session of one reviewer over the drawn prompts."""

    def __init__(
        self,
        items: Sequence[Item],
        judgements: Sequence[Judgement],
        settings: ReviewSettings,
        reviewer: str,
    ) -> None:
        self.reviewer, self.settings = reviewer, settings
        self.judgements = list(judgements)
        asked = [item for item in items if len(item.distinct) > 1]
        self.identical = len(items) - len(asked)
        common = {item.key for item in asked[: round(settings.overlap * len(asked))]}
        self.items = sorted(asked, key=lambda item: _chance(settings.seed, reviewer, item.key))
        self.orders = _orders(self.items, settings.seed, reviewer)
        relations = Relations(judgements)
        self.done: list[Item] = []
        self.open: list[Item] = []
        for item in self.items:
            judged = item.judged_by(relations)
            if reviewer in judged:
                self.done.append(item)
            elif item.key in common or not judged:
                self.open.append(item)

    def page(self) -> Page | None:
        """Return the next prompt with its answers; None if nothing is left."""
        return self._page(self.open[0]) if self.open else None

    def _page(self, item: Item) -> Page:
        texts = item.distinct
        shown = [texts[place] for place in self.orders[item.key]]
        seal = text_hash("\0".join([item.key, *map(text_hash, shown)]))
        done, left = len(self.done), len(self.open)
        return Page(item.key, item.prompt, shown, item.source, seal, left, done)

    def judge(
        self,
        key: str,
        seal: str,
        ranks: Sequence[int],
        correction: str | None = None,
        reason: str | None = None,
    ) -> Judgement:
        """Return the judgement of an open prompt. ranks: of the answers in the page's order.

        Raises DataError if the answers are not those of the page any more.
        """
        item = next((item for item in self.open if item.key == key), None)
        page = self._page(item) if item else None
        if item is None or page is None or page.seal != seal:
            raise DataError(
                where="review",
                found="the answers changed, or the prompt was judged, while the page was open",
                expected="a judgement of the answers of today",
                fix="reload the page: it shows the next prompt",
            )
        levels = sorted(set(ranks))
        if len(ranks) != len(page.answers) or levels != list(range(1, len(levels) + 1)):
            raise DataError(
                where="review",
                found=f"the ranks {list(ranks)[:9]}",
                expected=f"{len(page.answers)} ranks from 1, the best, without a gap",
                fix="press the keys of the page",
            )
        ranked = list(zip(page.answers, ranks, strict=True))
        return new_judgement(self.reviewer, item.prompt, item.source, ranked, correction, reason)

    def last(self) -> Judgement | None:
        """Return the reviewer's newest judgement of one of these prompts, which `u` takes back."""
        keys = {item.key for item in self.items}
        its = [
            one
            for one in self.judgements
            if one.reviewer == self.reviewer and one.prompt_hash in keys
        ]
        return its[-1] if its else None


def _orders(items: Sequence[Item], seed: int, reviewer: str) -> dict[str, list[int]]:
    """Return the order of each prompt's answers, so that each answer stands first equally often.

    Prompts with the same pattern of equal answers take turns in blocks: within a block each answer
    is first once, in random order. The others follow in random order.
    """
    chance = random.Random(_chance(seed, reviewer))
    blocks: dict[tuple[int, ...], list[int]] = {}
    orders: dict[str, list[int]] = {}
    for item in items:
        places = list(range(len(item.distinct)))
        block = blocks.setdefault(item.pattern, [])
        if not block:
            block.extend(chance.sample(places, len(places)))
        first = block.pop()
        others = [place for place in places if place != first]
        orders[item.key] = [first, *chance.sample(others, len(others))]
    return orders
