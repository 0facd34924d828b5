"""Score a model's own answers to rows by metrics that need an answer alone. No torch."""

from collections.abc import Sequence
from pathlib import Path

from ft_assets.config import EvaluationSettings
from ft_assets.evaluation.answer_scores import score_answers
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.metrics import Metric, Option
from ft_assets.metrics.program import program_scores
from ft_assets.metrics.user_function import UserFunction

Answered = tuple[ReferencedRow, str]  # a row, and an answer to it


class OwnScores:
    """Scores answers by the metrics of an evaluation, the user's function among them.

    schema: the parsed `evaluation.json_schema`. root: the folder of finetune.yaml.
    """

    def __init__(self, settings: EvaluationSettings, schema: Option, root: Path) -> None:
        self.settings, self.schema, self.root = settings, schema, root
        self._function: UserFunction | None = None

    def of(self, metric: Metric, answered: Sequence[Answered]) -> list[float]:
        """Return the score of each answer. Raises EvaluationError of the metric."""
        answers = [text for _, text in answered]
        references = [row["reference"] for row, _ in answered]
        conversations = [row["messages"][:-1] for row, _ in answered]
        if metric.config == "python" and (user := self.settings.user_metric):
            self._function = self._function or UserFunction(user, self.root)
            ids = [row["id"] for row, _ in answered]
            return self._function.scores(
                list(zip(ids, answers, references, conversations, strict=True))
            )
        if metric.config == "program" and self.settings.program is not None:
            return program_scores(
                self.settings.program, self.root, answers, references, conversations
            )
        name = metric.name
        return score_answers(answers, references, self.settings, self.schema, only=name)[name]
