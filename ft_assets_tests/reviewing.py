"""Items and simulated reviewers of a blind review, for tests and bench/review.py."""

import random
from collections.abc import Sequence

from ft_assets.config.review import ReviewSettings
from ft_assets.review.judgements import Judgement
from ft_assets.review.session import Item, Session

SETTINGS = ReviewSettings()


def item(number: int, cluster: str = "", **answers: str) -> Item:
    """Return a prompt with its candidates' answers; by default base and sft differ."""
    given = answers or {"base": f"old {number}", "sft": f"new {number}"}
    return Item([{"role": "user", "content": f"question {number}"}], given, cluster)


def simulated(
    items: Sequence[Item],
    reviewer: str,
    likes: Sequence[float],
    noise: float,
    chance: random.Random,
) -> list[Judgement]:
    """Judge every prompt of a session by what the pages show.

    likes: for each item, the value of `sft` against the base: 1, 0.5 or 0. noise: the share of
    judgements that a reviewer turns around.
    """
    truth = dict(zip((one.key for one in items), likes, strict=True))
    of = {one.key: one for one in items}
    given: list[Judgement] = []
    while (page := Session(items, given, SETTINGS, reviewer).page()) is not None:
        value = truth[page.key] if chance.random() >= noise else 1 - truth[page.key]
        first = page.answers[0] == of[page.key].answers["sft"]
        ranks = [1, 1] if value == 0.5 else [1, 2] if first == (value == 1) else [2, 1]
        given.append(Session(items, given, SETTINGS, reviewer).judge(page.key, page.seal, ranks))
    return given
