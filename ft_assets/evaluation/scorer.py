"""Score the answers of a candidate: apply metrics, the user's function and the judge. No torch."""

import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ft_assets.config import EvaluationSettings
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.answer_scores import retention_scores, score_answers
from ft_assets.evaluation.behaviour import refusal_pattern, repetition
from ft_assets.evaluation.kept_answers import AskedRow, GivenAnswer
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.scored_rows import PeopleScores, Preferred, ScoredRow, in_clusters
from ft_assets.metrics import Option
from ft_assets.metrics.judge import Orders, judge_scores
from ft_assets.metrics.label import choice
from ft_assets.metrics.program import program_scores
from ft_assets.metrics.user_function import UserFunction
from ft_assets.rows.types import DataRow

SHUFFLES = 10


@dataclass(frozen=True)
class Task:
    """The rows to ask and to score, the examples of the prompted base, the settings and files.

    train: rows that the candidates were trained on. few_answers: the answers are labels (form.py),
    so that train rows are answered too. people: their scores, for the metric `human`. schema: the
    parsed `evaluation.json_schema`. root: the folder of finetune.yaml.
    """

    heldout: list[ReferencedRow]
    settings: EvaluationSettings
    retention: list[ReferencedRow] = field(default_factory=list)
    train: list[ReferencedRow] = field(default_factory=list)
    few_answers: bool = False
    few_shot: Sequence[DataRow] = field(default_factory=list)
    few_shot_system: str | None = None
    people: PeopleScores = field(default_factory=dict)
    schema: Option = None
    root: Path = Path()


class Scorer:
    """Scores what was asked of candidates."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.settings = task.settings
        self.refusal = refusal_pattern(task.settings.refusals)
        user = task.settings.user_metric
        self.user_function = UserFunction(user, task.root) if user else None
        self.judge_orders: Orders = Counter()

    def heldout(
        self, asked: Sequence[AskedRow], base: Sequence[ScoredRow] | None
    ) -> list[ScoredRow]:
        """Score held-out rows, in the order of the task's rows.

        base: the base's scored rows, whose answers the judge compares with. None if the candidate
        is the base.
        """
        answered = [self.answered(row) for row in asked]
        texts = [row.answer for row in answered]
        references = [row.reference for row in asked]
        scores = score_answers(texts, references, self.settings, self.task.schema)
        scores["loss"] = [row.loss for row in asked]
        scores["token_accuracy"] = [row.token_accuracy for row in asked]
        if self.settings.choice:
            scores["choice"] = self._chosen(asked, references)
        scores |= self._with_conversation([row.id for row in asked], texts, references, base)
        scored = _with_scores(answered, scores)
        if "human" in self.settings.metric_names():
            people = [self.task.people.get(row.id, {}) for row in asked]
            scored = _by_people(scored, people, scored if base is None else base)
        return in_clusters(scored, self.task.heldout)

    def _chosen(self, asked: Sequence[AskedRow], references: list[str]) -> list[float]:
        """Score 1 where the reference is the most likely of the asked options."""
        per_token = self.settings.choice_per_token
        likely = [
            [
                one.log_probability / one.tokens if per_token else one.log_probability
                for one in row.options
            ]
            for row in asked
        ]
        return choice(likely, references, [[one.text for one in row.options] for row in asked])

    def rival(self, asked: Sequence[AskedRow]) -> list[ScoredRow]:
        """Score held-out rows of a rival, of which only the answers are known."""
        answered = [self.answered(row) for row in asked]
        texts = [row.answer for row in answered]
        references = [row.reference for row in asked]
        scores = score_answers(texts, references, self.settings, self.task.schema)
        scores |= self._by_user([row.id for row in asked], texts, references)
        return in_clusters(_with_scores(answered, scores), self.task.heldout)

    def gate_scores(self, asked: Sequence[AskedRow]) -> list[dict[str, float]]:
        """Score answers to held-out or train rows by the gate's metric alone: {metric: score}.

        The scores are {} if the metric is not one of the answer: the loss, and the judge, which
        compares with the base.
        """
        metric = self.settings.main_metric()
        texts = [row.answer.text for row in asked if row.answer]
        references = [row.reference for row in asked]
        user = self.settings.user_metric
        if metric.of_answer and metric.needs_reference:
            scores = score_answers(
                texts, references, self.settings, self.task.schema, only=metric.name
            )[metric.name]
        elif metric.name == "choice":
            scores = self._chosen(asked, references)
        elif self.user_function is not None and user is not None and metric.name == user.name:
            of = {row["id"]: row["messages"][:-1] for row in [*self.task.heldout, *self.task.train]}
            ids = [row.id for row in asked]
            conversations = [of[row] for row in ids]
            rows = zip(ids, texts, references, conversations, strict=True)
            scores = self.user_function.scores(list(rows))
        else:
            return [{} for _ in asked]
        return [{metric.name: score} for score in scores]

    def answered(self, row: AskedRow) -> ScoredRow:
        """Return an answered row; its scores are `refused` and `repetition`."""
        assert row.answer is not None, f"row {row.id} was not answered"
        return self.behaviour(row.answer)

    def behaviour(self, answer: GivenAnswer) -> ScoredRow:
        """Return the answer as a row with the scores that need no reference."""
        refused = float(self.refusal.search(answer.text) is not None)
        scores = {"refused": refused, "repetition": repetition(answer.text)}
        return ScoredRow(scores, answer.text, answer.stopped, answer.tokens)

    def _with_conversation(
        self,
        ids: list[str],
        answers: list[str],
        references: list[str],
        base: Sequence[ScoredRow] | None,
    ) -> dict[str, list[float]]:
        """Return the scores of the metrics that also get the conversation."""
        scores = self._by_user(ids, answers, references)
        conversations = [row["messages"][:-1] for row in self.task.heldout]
        if self.settings.program:
            scores["program"] = program_scores(
                self.settings.program, self.task.root, answers, references, conversations
            )
        if self.settings.judge:
            rivals = answers if base is None else [row.answer for row in base]
            scores["judge"] = judge_scores(
                self.settings.judge, ids, conversations, answers, rivals, self.judge_orders
            )
        return scores

    def _by_user(
        self, ids: list[str], answers: list[str], references: list[str]
    ) -> dict[str, list[float]]:
        """Return the scores of held-out answers by the user's function, {} without one."""
        user = self.settings.user_metric
        if self.user_function is None or user is None:
            return {}
        conversations = [row["messages"][:-1] for row in self.task.heldout]
        rows = zip(ids, answers, references, conversations, strict=True)
        return {user.name: self.user_function.scores(list(rows))}

    def chance(self, scored: Sequence[ScoredRow]) -> list[float]:
        """Return the mean score of each answer against the references of other rows.

        The metric is the gate's. [] if the comparison means nothing: all references are equal, or
        the metric is not of answer and reference alone.
        """
        answers = [row.answer for row in scored]
        references = [row["reference"] for row in self.task.heldout]
        gate = self.settings.main_metric()
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

    def retention(self, asked: Sequence[AskedRow]) -> list[ScoredRow]:
        """Score general prompts: the task score of those that were answered, the loss of all."""
        answered = [row for row in asked if row.answer is not None]
        metric = self.settings.retention_metric
        values = iter(
            retention_scores(
                [row.answer.text for row in answered if row.answer],
                [row.reference for row in answered],
                metric,
            )
            if answered
            else []
        )
        scored = [
            (
                ScoredRow(scores={}, answered=False)
                if row.answer is None
                else self.behaviour(row.answer).scored({metric: next(values)})
            ).scored({"loss": row.loss})
            for row in asked
        ]
        return in_clusters(scored, self.task.retention)


def _with_scores(
    rows: Sequence[ScoredRow], scores: Mapping[str, Sequence[float]]
) -> list[ScoredRow]:
    """Return the rows with a further score of each metric."""
    return [
        row.scored({name: values[index] for name, values in scores.items()})
        for index, row in enumerate(rows)
    ]


def _by_people(
    scored: Sequence[ScoredRow],
    people: Sequence[Mapping[str, Preferred]],
    base: Sequence[ScoredRow],
) -> list[ScoredRow]:
    """Add people's scores of exactly these answers; an answer that nobody judged has none.

    people: by answer, of each row. Raises EvaluationError if nobody judged any of them.
    """
    preferred = [its.get(one.answer, {}) for its, one in zip(people, scored, strict=True)]
    known = [its.get(rival.answer) for its, rival in zip(preferred, base, strict=True)]
    if all(score is None for score in known):
        raise EvaluationError(
            where="metric human",
            found=f"people judged none of these {len(scored)} answers",
            expected="judgements of exactly these answers",
            fix="judge them with ft review, then materialize human_review (ft run)",
        )
    return [
        one if score is None else replace(one.scored({"human": score}), preferred=its)
        for one, score, its in zip(scored, known, preferred, strict=True)
    ]
