"""Step: let the base answer general prompts, so that its own answers are trained beside the task.

An answer that is cut off, empty, repetitive, or not provable is left out, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ft_assets.config import SamplingSettings
from ft_assets.data.canonical import conversation, prompt
from ft_assets.data.content import PROMPTS
from ft_assets.data.left_out import KIND
from ft_assets.data.tables import CONVERSATION, REJECTED, read_table, write_table
from ft_assets.data.units import normalise
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import ConversationRow, RejectedRow
from ft_assets.rows.values import RowProblem
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.chat.rendering import Renderer
    from ft_assets.inference.generation import Answer

TABLE = "rehearsal"
SHIPPED = Path(__file__).parents[1] / "data" / "general_prompts.txt"
# The model's own distribution: the expected gradient of its own samples is zero, so they hold the
# model where it is. Likelier answers alone (a lower temperature) would sharpen it.
SAMPLING = SamplingSettings(n=1, temperature=1.0)
REPEATED = 0.3  # share of repeated 4-grams of a degenerate answer; that of people's is below 0.05
SHOWN = 500  # characters of an answer that is left out


class Settings(StepSettings):
    STEP: ClassVar = Step("own_rehearsal", gpu=True)

    max_new_tokens: int
    batch_size: int | None = None


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    from ft_assets.chat.rendering import Renderer
    from ft_assets.models.loading import context_length, load_tokenizer, stop_ids

    snapshot = job.inputs["base_model"]
    tokenizer, stops = load_tokenizer(snapshot), stop_ids(snapshot)
    rows, renderer = _prompts(job), Renderer(tokenizer, stops)
    context = context_length(snapshot)
    most = None if context is None else context - settings.max_new_tokens
    asked, left = _asked(renderer, rows, most)
    answers, cost = _answer(job, settings, tokenizer, stops, asked, report) if asked else ([], {})
    made: list[ConversationRow] = []
    for (row, _), (answer,) in zip(asked, answers, strict=True):
        whole = _answered(renderer, row, answer)
        if isinstance(whole, tuple):
            left.append(_left(row, *whole, answer.text))
        else:
            made.append(whole)
    (job.output / "info").mkdir()
    write_table(job.output / "info" / "rejected.parquet", left, REJECTED)
    made.sort(key=lambda row: row["id"])
    parts = {TABLE: write_table(job.output / f"{TABLE}.parquet", made, CONVERSATION)}
    report("answered general prompts", rows=len(made), left_out=len(left))
    kinds = Counter(f"{KIND}{row.get('kind')}" for row in left)
    return StepResult({"prompts": len(rows), "rows": len(made), **kinds, **cost}, parts)


def _prompts(job: Job) -> list[ConversationRow]:
    """Return the prompts as rows without an answer, by id: the user's, or those of SHIPPED."""
    if "raw_dataset" in job.inputs:
        return read_table(job.inputs["raw_dataset"] / f"{PROMPTS}.parquet", row=ConversationRow)
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    rows: list[ConversationRow] = [
        {**prompt({"prompt": line}), "source": f"{SHIPPED.name}:{number}"}
        for number, line in enumerate(lines, 1)
    ]
    return sorted(rows, key=lambda row: row["id"])


def _asked(
    renderer: Renderer, rows: Sequence[ConversationRow], most: int | None
) -> tuple[list[tuple[ConversationRow, list[int]]], list[RejectedRow]]:
    """Return the rows to ask with their token ids, and those that cannot be asked."""
    asked: list[tuple[ConversationRow, list[int]]] = []
    left: list[RejectedRow] = []
    for row, ids in zip(rows, renderer.prompts(rows), strict=True):
        if not isinstance(ids, list):
            left.append(_left(row, "template", str(ids)))
        elif most is not None and len(ids) > most:
            left.append(_left(row, "too long", f"has {len(ids)} tokens; the context allows {most}"))
        else:
            asked.append((row, ids))
    return asked, left


def _answer(
    job: Job,
    settings: Settings,
    tokenizer: Any,
    stops: frozenset[int],
    asked: Sequence[tuple[ConversationRow, list[int]]],
    report: Report,
) -> tuple[list[list[Answer]], dict[str, float]]:
    """Return an answer of the base to each prompt, and what it cost. What is kept is not asked."""
    from ft_assets.evaluation.own_answers import Asked, Sampler
    from ft_assets.models.loading import load_base

    sampler = Sampler(
        load_base(job.inputs["base_model"]),
        tokenizer,
        stops,
        settings.max_new_tokens,
        settings.batch_size,
        SAMPLING,
    )
    rows = [Asked(row["id"], ids) for row, ids in asked]
    return sampler.sample(rows, job.checkpoints / "answers.jsonl", report)


def _answered(
    renderer: Renderer, row: ConversationRow, answer: Answer
) -> ConversationRow | tuple[str, str]:
    """Return the conversation to train, or why there is none: the kind, and the reason in full.

    Earlier answers of the prompt are context: they are not the base's own.
    """
    if kind := flaw(answer):
        return kind, f"the answer is {kind} ({answer.tokens} tokens)"
    given = [
        {**turn, "train": False} if turn["role"] == "assistant" else turn
        for turn in row["messages"]
    ]
    turns = [*given, {"role": "assistant", "content": answer.text.strip()}]
    try:
        whole = conversation({"messages": turns, "tools": row.get("tools")})
    except RowProblem as problem:
        return "template", str(problem)
    (proven,) = renderer.train([whole])
    return (
        {**whole, "source": row["source"]}
        if isinstance(proven, list)
        else ("template", str(proven))
    )


def flaw(answer: Answer) -> str:
    """Return why an answer is not worth learning, or ''."""
    from ft_assets.evaluation.behaviour import repetition

    if not answer.stopped:
        return "cut off"
    if not answer.text.strip():
        return "empty"
    # By units, because some scripts have no blanks between words.
    return "repetitive" if repetition(normalise(answer.text)) >= REPEATED else ""


def _left(row: ConversationRow, kind: str, problem: str, answer: str = "") -> RejectedRow:
    text = "\n".join([*(turn["content"] for turn in row["messages"]), answer])[:SHOWN]
    return {"where": row["source"], "problem": problem, "row": text, "kind": kind}


if __name__ == "__main__":
    main(step)
