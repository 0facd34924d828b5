"""Choose the examples of the prompted base from the training rows (`data.few_shot: auto`).

A rival with bad examples flatters the fine-tune. A few sets of training rows are drawn; the base
answers validation rows with each of them, and the set with the best score is the rival's. Held-out
rows take no part: the rival is chosen as a fine-tune's settings are.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ft_assets.chat.rendering import Renderer
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.asker import Asker, tokenized
from ft_assets.evaluation.few_shot import few_shot_prompt
from ft_assets.evaluation.kept_answers import AskedRow
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.report_model import ExampleSet, FewShotChoice
from ft_assets.evaluation.scorer import Scorer, Task
from ft_assets.rows.types import DataRow

SETS = 4  # that are tried
EXAMPLES = 4  # in a set
ROWS = 32  # that the base answers with each set


@dataclass(frozen=True)
class Pool:
    """The rows to choose examples from and the rows to choose by, none of which is held out.

    The base was trained on neither. By training rows it is chosen where validation rows are few.
    """

    train: list[ReferencedRow]
    validation: list[ReferencedRow]

    def sets(self, seed: int) -> list[list[ReferencedRow]]:
        """Return the sets of training rows to try."""
        rows = sorted(self.train, key=lambda row: row["id"])
        chance = random.Random(seed)
        return [chance.sample(rows, min(EXAMPLES, len(rows))) for _ in range(SETS)]

    def judges(self, sets: Sequence[Sequence[ReferencedRow]]) -> list[ReferencedRow]:
        """Return the rows to choose by: validation rows, then training rows that no set has."""
        taken = {row["group"] for examples in sets for row in examples}
        others = [row for row in self.train if row["group"] not in taken]
        by_id = [sorted(rows, key=lambda row: row["id"]) for rows in (self.validation, others)]
        return [row for rows in by_id for row in rows][:ROWS]


def choose(asker: Asker, pool: Pool, task: Task) -> tuple[list[ReferencedRow], FewShotChoice]:
    """Return the examples with the best score, and how they were chosen.

    The base is active in the asker's model. The score is the mean of the gate's metric; if it is
    not one of the answer (the judge), the loss of the references. A set that cannot be asked, e.g.
    because its prompts do not fit the context, has no score. Raises EvaluationError if none has.
    """
    sets = pool.sets(task.settings.seed)
    rows = pool.judges(sets)
    scorer = Scorer(replace(task, train=rows))
    scores: list[float | None] = []
    metric, problem = task.settings.metric, "there are no training rows"
    for examples in sets:
        try:
            shown = prompted(asker.renderer, rows, examples, task.few_shot_system)
            asked = asker.heldout(shown) if examples else []
        except EvaluationError as error:
            problem, asked = error.found, []
        if asked:
            metric, score = _score(asked, scorer)
            scores.append(score)
        else:
            scores.append(None)
    lower = metric == "loss" or metric in task.settings.lower_is_better()
    known = [
        (-score if lower else score, place)
        for place, score in enumerate(scores)
        if score is not None
    ]
    if not known:
        raise EvaluationError(
            where="data.few_shot: auto",
            found=f"none of {SETS} sets of {EXAMPLES} training rows can be asked with: {problem}",
            expected="training rows that fit the model's context together with a question",
            fix="name a file with short examples in data.few_shot, or leave data.few_shot out",
        )
    best = max(known, key=lambda one: (one[0], -one[1]))[1]
    tried = [
        ExampleSet(rows=[row["id"] for row in examples], score=score)
        for examples, score in zip(sets, scores, strict=True)
    ]
    choice = FewShotChoice(chosen=best, metric=metric, rows=len(rows), tried=tried)
    return sets[best], choice


def _score(asked: Sequence[AskedRow], scorer: Scorer) -> tuple[str, float]:
    metric = scorer.settings.metric
    scores = [row[metric] for row in scorer.gate_scores(asked) if row]
    if scores:
        return metric, statistics.fmean(scores)
    return "loss", statistics.fmean(row.loss for row in asked)


def prompted(
    renderer: Renderer,
    rows: Sequence[ReferencedRow],
    examples: Sequence[DataRow],
    system: str | None,
) -> list[ReferencedRow]:
    """Return the rows with the examples before their own turns, tokenized."""
    asked: list[ReferencedRow] = [
        {**row, "messages": few_shot_prompt(row["messages"], system, examples)} for row in rows
    ]
    return tokenized(renderer, asked)
