"""Score the active candidate of a model: generate answers, compute losses, apply metrics."""

import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.config import EvaluationSettings
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.answer_scores import retention_scores, score_answers
from ft_assets.evaluation.behaviour import refusal_pattern, repetition
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.inference.generation import generate
from ft_assets.inference.losses import answer_losses, sequence_log_probabilities
from ft_assets.metrics import Option
from ft_assets.metrics.judge import judge_scores
from ft_assets.metrics.label import choice
from ft_assets.metrics.user_function import load_function, user_scores
from ft_assets.rows.types import ConversationRow, Message, TokenizedRow

LOSS_BATCH = 32
SHUFFLES = 10
Row = TypeVar("Row", bound=TokenizedRow)
Tokens = TypeVar("Tokens")


@dataclass(frozen=True)
class Task:
    """The rows to score, the examples of the prompted base, the settings and their files.

    schema: the parsed `evaluation.json_schema`. root: the folder of finetune.yaml.
    """

    heldout: list[ReferencedRow]
    settings: EvaluationSettings
    retention: list[ReferencedRow] = field(default_factory=list)
    train: list[TokenizedRow] = field(default_factory=list)
    few_shot: list[ConversationRow] = field(default_factory=list)
    few_shot_system: str | None = None
    schema: Option = None
    root: Path = Path()


class Scorer:
    """Scores the candidate that is active in the model."""

    def __init__(self, model: Any, tokenizer: Any, stops: frozenset[int], task: Task) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stops = stops
        self.task = task
        self.settings = task.settings
        self.renderer = Renderer(tokenizer, stops)
        self.refusal = refusal_pattern(task.settings.refusals)
        user = task.settings.user_metric
        self.user_function = load_function(user.function, task.root) if user else None

    def tokenized(self, rows: Sequence[Row]) -> list[Row]:
        """Tokenize rows with this model's tokenizer and template, in place of another's tokens."""
        return tokenized(self.renderer, rows)

    def losses(self, rows: Sequence[TokenizedRow]) -> tuple[list[float], list[float]]:
        """Return the losses (nats per token) and token accuracies of the reference answers."""
        return answer_losses(
            self.model, rows, self.settings.batch_size or LOSS_BATCH, self.tokenizer.pad_token_id
        )

    def loss_under(self, template: str, rows: Sequence[TokenizedRow]) -> float:
        """Return the mean loss of the references under another template, in nats per token."""
        used = self.tokenizer.chat_template
        self.tokenizer.chat_template = template
        try:
            rendered = tokenized(Renderer(self.tokenizer, self.stops), rows)
            return statistics.fmean(self.losses(rendered)[0])
        finally:
            self.tokenizer.chat_template = used

    def answers(self, rows: Sequence[TokenizedRow]) -> list[ScoredRow]:
        """Generate the greedy answers; their scores are `refused` and `repetition`."""
        answers = generate(
            self.model,
            self.tokenizer,
            prompts(self.renderer, rows),
            self.stops,
            self.settings.max_new_tokens,
            self.settings.batch_size,
            [row["id"] for row in rows],
        )
        return [
            ScoredRow(
                scores={
                    "refused": float(self.refusal.search(answer.text) is not None),
                    "repetition": repetition(answer.text),
                },
                answer=answer.text,
                stopped=answer.stopped,
                tokens=answer.tokens,
            )
            for answer in answers
        ]

    def heldout(
        self, rows: Sequence[ReferencedRow], base: Sequence[ScoredRow] | None
    ) -> list[ScoredRow]:
        """Answer and score held-out rows.

        base: the base's scored rows, whose answers the judge compares with. None if the candidate
        is the base.
        """
        answered = self.answers(rows)
        texts = [row.answer for row in answered]
        references = [row["reference"] for row in rows]
        scores = score_answers(texts, references, self.settings, self.task.schema)
        scores["loss"], scores["token_accuracy"] = self.losses(rows)
        if self.settings.choice:
            scores["choice"] = self.choices(rows, references)
        scores |= self._with_conversation([row["id"] for row in rows], texts, references, base)
        return [
            row.scored({name: values[index] for name, values in scores.items()})
            for index, row in enumerate(answered)
        ]

    def _with_conversation(
        self,
        ids: list[str],
        answers: list[str],
        references: list[str],
        base: Sequence[ScoredRow] | None,
    ) -> dict[str, list[float]]:
        """Return the scores of the metrics that also get the conversation."""
        scores = {}
        conversations = [row["messages"][:-1] for row in self.task.heldout]
        if self.user_function is not None and (user := self.settings.user_metric):
            scores[user.name] = user_scores(
                self.user_function, user.function, ids, answers, references, conversations
            )
        if self.settings.judge:
            rivals = answers if base is None else [row.answer for row in base]
            scores["judge"] = judge_scores(self.settings.judge, ids, conversations, answers, rivals)
        return scores

    def chance(self, scored: Sequence[ScoredRow]) -> list[float]:
        """Return the mean score of each answer against the references of other rows.

        The metric is the gate's. [] if the comparison means nothing: all references are equal, or
        the metric is not of answer and reference alone.
        """
        answers = [row.answer for row in scored]
        references = [row["reference"] for row in self.task.heldout]
        gate = next(one for one in self.settings.measured() if one.name == self.settings.metric)
        if len(set(references)) == 1 or not (gate.of_answer and gate.needs_reference):
            return []
        count = min(SHUFFLES, len(references) - 1)
        offsets = random.Random(self.settings.seed).sample(range(1, len(references)), count)
        drawn = [
            score_answers(
                answers,
                references[offset:] + references[:offset],
                self.settings,
                self.task.schema,
                only=gate.name,
            )[gate.name]
            for offset in offsets
        ]
        return [statistics.fmean(values) for values in zip(*drawn, strict=True)]

    def choices(self, rows: Sequence[ReferencedRow], references: list[str]) -> list[float]:
        """Score 1 where the reference is the most likely label of all."""
        labels = self.settings.labels
        candidates = [
            _with_answer(row, {"role": "assistant", "content": label})
            for row in rows
            for label in labels
        ]
        sums = sequence_log_probabilities(
            self.model,
            tokenized(self.renderer, candidates),
            self.settings.batch_size or LOSS_BATCH,
            self.tokenizer.pad_token_id,
        )
        by_row = [sums[begin : begin + len(labels)] for begin in range(0, len(sums), len(labels))]
        return choice(by_row, references, labels)

    def retention(self, rows: Sequence[ReferencedRow]) -> list[ScoredRow]:
        """Score general prompts: the loss of all, and the first `retention_answers` answered."""
        if not rows:
            return []
        answered = self.answers(rows[: self.settings.retention_answers])
        metric = self.settings.retention_metric
        scores = retention_scores(
            [row.answer for row in answered],
            [row["reference"] for row in rows[: len(answered)]],
            metric,
        )
        scored = [row.scored({metric: score}) for row, score in zip(answered, scores, strict=True)]
        scored += [ScoredRow(scores={}, answered=False) for _ in rows[len(answered) :]]
        losses, _ = self.losses(rows)
        return [row.scored({"loss": loss}) for row, loss in zip(scored, losses, strict=True)]


def _with_answer(row: Row, answer: Message) -> Row:
    changed = row.copy()
    changed["messages"] = [*row["messages"][:-1], answer]
    return changed


def tokenized(renderer: Renderer, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the tokens of prompt and answer. Raises EvaluationError."""
    result = []
    for row, rendered in zip(rows, renderer.answers(rows), strict=True):
        prompt, answer = _proven(row, rendered)
        changed = row.copy()
        changed["input_ids"] = prompt + answer
        changed["supervised"] = [False] * len(prompt) + [True] * len(answer)
        result.append(changed)
    return result


def prompts(renderer: Renderer, rows: Sequence[TokenizedRow]) -> list[list[int]]:
    """Return the token ids before the last message of each row. Raises EvaluationError."""
    asked: list[TokenizedRow] = [{**row, "messages": row["messages"][:-1]} for row in rows]
    rendered = renderer.prompts(asked)
    return [_proven(row, prompt) for row, prompt in zip(rows, rendered, strict=True)]


def _proven(row: TokenizedRow, rendered: Tokens | ProofFailed) -> Tokens:
    if isinstance(rendered, ProofFailed):
        raise EvaluationError(
            where=f"held-out row {row['id']}",
            found=f"cannot be rendered for this candidate: {rendered}",
            expected="a prompt that the chat template accepts",
            fix="correct data.few_shot and few_shot_system, or chat.chat_template",
        )
    return rendered


@contextmanager
def active(model: Any, adapter: str | None) -> Iterator[None]:
    """Activate one adapter, or disable all of them (None), for the duration of the block."""
    if adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        yield
