"""A blind review as a reviewer sees it. Nothing here tells which model gave an answer."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ft_assets.config.review import ReviewSettings
from ft_assets.errors import ArtifactError, ConfigError, DataError
from ft_assets.review.candidates import heldout_rows, review_items
from ft_assets.review.corrections import Corrections, corrections
from ft_assets.review.fresh import FreshPrompt, FreshPrompts, without_heldout
from ft_assets.review.judgements import (
    Judgements,
    Withdrawal,
    now,
    prompt_hash,
    require_reviewer,
)
from ft_assets.review.session import Page, Session, drawn
from ft_assets.views.board import Opened

NOBODY = "nobody"  # the reviewer before a name is given
WRITING = threading.Lock()  # a key pressed twice is one judgement


class Asked(Protocol):
    """Loaded models, e.g. SideBySide."""

    system: str | None

    def answers(self, message: str) -> Iterable[tuple[str, str]]: ...


@dataclass(frozen=True)
class Turn:
    """A message of the prompt as text."""

    role: str
    text: str


@dataclass(frozen=True)
class ReviewView:
    """What a reviewer sees. page: the next prompt; None before a name is given, and at the end.

    reviewers: (name, judgements of this review) of everybody. why_not: why nothing can be reviewed.
    """

    base_model: str
    base_models: Sequence[str]
    reviewer: str = ""
    page: Page | None = None
    turns: Sequence[Turn] = ()
    left: int = 0
    done: int = 0
    identical: int = 0
    can_undo: bool = False
    reviewers: Sequence[tuple[str, int]] = field(default_factory=list)
    why_not: str = ""


def need_review(opened: Opened) -> ReviewSettings:
    """Return the settings of the review. Raises ConfigError if there are none."""
    if opened.project.review is None:
        raise ConfigError(
            where="finetune.yaml",
            found="there is no section review",
            expected="the settings of a blind review",
            fix="add the line `review: {}`, which takes the defaults",
        )
    return opened.project.review


def judgements_of(opened: Opened) -> Judgements:
    """Return the judgements of a project. Raises ConfigError."""
    return Judgements(opened.project.path(need_review(opened).folder))


def fresh_prompts(opened: Opened, base_model: str) -> FreshPrompts:
    """Return the fresh prompts of a base model. Raises ConfigError."""
    return FreshPrompts(opened.project.path(need_review(opened).folder), base_model)


def ask_fresh(
    opened: Opened,
    base_model: str,
    messages: Sequence[str],
    models: Asked,
    told: Callable[[str], None],
) -> int:
    """Ask the models and keep their answers; return the number of prompts.

    Raises DataError for a prompt that is held out, before any is asked.
    """
    kept = fresh_prompts(opened, base_model)
    heldout = {item.key for item in review_items(opened.store, base_model).values()}
    before = [{"role": "system", "content": models.system}] if models.system else []
    prompts = [[*before, {"role": "user", "content": message}] for message in messages]
    for prompt in prompts:
        if prompt_hash(prompt) in heldout:
            raise DataError(
                where="--ask",
                found=f"the prompt {prompt[-1]['content'][:60]!r} is held out",
                expected="fresh prompts, whose corrections can become training rows",
                fix="remove it: ft review shows held-out prompts anyway",
            )
    for number, prompt in enumerate(prompts, 1):
        answers = dict(models.answers(prompt[-1]["content"]))
        kept.add(FreshPrompt(at=now(), prompt=prompt, answers=answers))
        told(f"{number} of {len(prompts)} prompts asked")
    return len(prompts)


def corrections_of(opened: Opened) -> Corrections:
    """Return the corrections of a project. What is held out for any base model is left out."""
    splits = [opened.store.current("heldout_split", name) for name in opened.project.base_models]
    heldout = {
        prompt_hash(row["messages"][:-1])
        for split in splits
        if split is not None
        for row in heldout_rows(opened.store.verified(split))
    }
    return corrections(judgements_of(opened).read(), heldout)


def session(opened: Opened, base_model: str, reviewer: str) -> Session:
    """Return a reviewer's session. Raises ConfigError, ArtifactError or DataError."""
    settings = need_review(opened)
    opened.project.base_model(base_model)
    heldout = list(review_items(opened.store, base_model).values())
    fresh = without_heldout(fresh_prompts(opened, base_model).items(), heldout)
    items = [*drawn(heldout, settings), *fresh]
    return Session(items, judgements_of(opened).read(), settings, require_reviewer(reviewer))


def review_view(opened: Opened, base_model: str | None, reviewer: str) -> ReviewView:
    """Return what a reviewer sees now. Raises ConfigError or DataError."""
    settings, names = opened.project.review, list(opened.project.base_models)
    name = base_model or names[0]
    opened.project.base_model(name)
    if settings is None:
        why = "finetune.yaml has no section review. Add the line: review: {}"
        return ReviewView(name, names, why_not=why)
    try:
        its = session(opened, name, reviewer or NOBODY)
    except ArtifactError as error:
        return ReviewView(name, names, why_not=f"There are no answers to review yet. {error}")
    if not reviewer:
        counts = Counter(one.reviewer for one in its.judgements)
        return ReviewView(name, names, reviewers=sorted(counts.items()))
    page = its.page()
    return ReviewView(
        base_model=name,
        base_models=names,
        reviewer=reviewer,
        page=page,
        turns=[Turn(str(turn["role"]), _text(turn)) for turn in page.prompt] if page else [],
        left=len(its.open),
        done=len(its.done),
        identical=its.identical,
        can_undo=its.last() is not None,
    )


def _text(message: Any) -> str:
    """Return a message's text, and its other keys as JSON, e.g. tool calls."""
    rest = {
        key: value for key, value in message.items() if key not in ("role", "content") and value
    }
    parts = [message.get("content") or "", json.dumps(rest, ensure_ascii=False) if rest else ""]
    return "\n".join(part for part in parts if part)


def judge(
    opened: Opened,
    base_model: str,
    reviewer: str,
    key: str,
    seal: str,
    ranks: Sequence[int],
    correction: str | None,
    reason: str | None,
) -> None:
    """Keep a judgement. Raises DataError if it is not about what is shown now."""
    with WRITING:
        made = session(opened, base_model, reviewer).judge(key, seal, ranks, correction, reason)
        judgements_of(opened).add(reviewer, made)


def undo(opened: Opened, base_model: str, reviewer: str) -> None:
    """Take the reviewer's last judgement back. Raises DataError if there is none."""
    with WRITING:
        last = session(opened, base_model, reviewer).last()
        if last is None:
            raise DataError(
                where="review",
                found=f"{reviewer} has judged no prompt of {base_model}",
                expected="a judgement to take back",
                fix="judge a prompt first",
            )
        judgements_of(opened).add(reviewer, Withdrawal(withdraws=last.id, at=now()))
