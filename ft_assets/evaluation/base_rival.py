"""Let a base model of the graph answer the held-out rows as a rival, on this machine."""

import time
from collections.abc import Sequence
from typing import cast

from ft_assets.chat.rendering import Renderer
from ft_assets.config import EvaluationSettings, RetrievalRival
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.asker import Asker, answer_key, prompts
from ft_assets.evaluation.context import Room
from ft_assets.evaluation.kept_answers import GivenAnswer, read_kept
from ft_assets.evaluation.rival_answers import (
    KeptAnswers,
    LocalBase,
    Question,
    RivalAnswer,
    Tried,
)
from ft_assets.evaluation.scorer import Task
from ft_assets.job import Report
from ft_assets.models.loading import context_length, load_base, load_tokenizer, stop_ids
from ft_assets.rows.types import TokenizedRow


def ask_base(
    rival: str,
    base: LocalBase,
    questions: Sequence[Question],
    settings: EvaluationSettings,
    kept: KeptAnswers,
    tried: Tried,
    report: Report,
) -> list[RivalAnswer]:
    """Return the greedy answers. The model is loaded only if one of them is not kept.

    Raises EvaluationError for a question that the model's template or context refuses.
    """
    tokenizer, stops = load_tokenizer(base.snapshot), stop_ids(base.snapshot)
    limit, renderer = settings.max_new_tokens, Renderer(tokenizer, stops)
    rows = [_row(question) for question in questions]
    asked = prompts(renderer, rows)
    _require_room(rival, base, questions, asked, settings)
    keys = [answer_key(base.version, limit, stops, ids) for ids in asked]
    graph = read_kept(base.answers, report).answers
    missing = [place for place, key in enumerate(keys) if key not in kept and key not in graph]
    made: dict[str, GivenAnswer] = {}
    seconds = 0.0
    if missing:
        begun = time.perf_counter()
        task = Task(heldout=[], settings=settings)
        asker = Asker(load_base(base.snapshot), tokenizer, stops, task, base.version)
        answers = asker.answers([rows[place] for place in missing])
        made = {answer.key: answer for answer in answers}
        seconds = (time.perf_counter() - begun) / len(missing)

    def one(place: int) -> RivalAnswer:
        key, row = keys[place], questions[place].id
        if key in kept and key not in made:
            return kept[key].model_copy(update={"rival": rival, "id": row})
        answer = made.get(key) or graph[key]
        return RivalAnswer(
            rival=rival,
            id=row,
            key=key,
            text=answer.text,
            stopped=answer.stopped,
            tokens_in=len(asked[place]),
            tokens_out=answer.tokens,
            seconds=seconds if key in made else None,
            model=base.name,
        )

    found = [one(place) for place in range(len(questions))]
    for place in missing:
        tried.add(found[place])
    report(f"asked {rival}", answers=len(missing), kept=len(questions) - len(missing))
    return found


def _row(question: Question) -> TokenizedRow:
    """Return the question as a row whose last message is not read."""
    turns = [*question.messages, {"role": "assistant", "content": ""}]
    return cast(TokenizedRow, {"id": question.id, "messages": turns})


def _require_room(
    rival: str,
    base: LocalBase,
    questions: Sequence[Question],
    asked: Sequence[list[int]],
    settings: EvaluationSettings,
) -> None:
    room = Room(context_length(base.snapshot), settings.max_new_tokens)
    lengths = {one.id: len(ids) for one, ids in zip(questions, asked, strict=True)}
    error = room.rows_error(lengths, f"evaluation.rivals.{rival}, held-out")
    if error is None:
        return
    fix = error.fix
    if isinstance(settings.rivals[rival], RetrievalRival):
        fix = "lower top_k or chunk_words of this rival, or take a base with a larger context"
    raise EvaluationError(where=error.where, found=error.found, expected=error.expected, fix=fix)
