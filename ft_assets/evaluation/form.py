"""The rivals that know the form of an answer and not its content, for tasks with few answers.

A base that writes "No." where the reference is "No" scores 0, and a fine-tune that learnt nothing
but the form beats it. These rivals have the form: always the most frequent answer of the training
rows, and the base's most likely option. No torch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ft_assets.config import EvaluationSettings
from ft_assets.evaluation.kept_answers import AskedOption, AskedRow, GivenAnswer
from ft_assets.evaluation.references import stored_reference
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.evaluation.scorer import Scorer
from ft_assets.metrics.label import normal_label
from ft_assets.rows.types import TokenizedRow

MAJORITY = "the most frequent answer"
HELD = "the base held to the options"
PROMPTED = "the prompted base"
REPEATED = 4  # times that an answer occurs on average in a task of few answers
HELD_SEQUENCES = 2048  # of row and label that the base scores; 77 labels: 27 rows
MIN_HELD_ROWS = 20


def held_rows(rows: int, labels: int) -> int:
    """Return for how many of the rows the base scores each label."""
    return min(rows, max(MIN_HELD_ROWS, HELD_SEQUENCES // labels + 1))


def has_few_answers(settings: EvaluationSettings, train: Sequence[TokenizedRow]) -> bool:
    """Return True if the answers are labels: by the settings, or as the training rows repeat."""
    if settings.labels or settings.choice:
        return True
    answers = [_answer(row) for row in train]
    return 0 < len(set(answers)) * REPEATED <= len(answers)


def is_json(settings: EvaluationSettings) -> bool:
    """Return True if the gate's metric is about an answer in JSON."""
    known = {metric.name: metric for metric in settings.measured()}[settings.metric]
    return known.config in ("json_fields", "json_schema") and bool(settings.option(known))


def why_not_measured(settings: EvaluationSettings) -> str | None:
    """Return why form and content are not told apart without rivals; None if they need not be."""
    metric = {one.name: one for one in settings.measured()}[settings.metric]
    if is_json(settings):
        return (
            "data.few_shot names no examples, so that the base was not asked with a prompt "
            "(`auto` chooses them)"
        )
    if metric.of_answer and not metric.needs_reference:
        return f"{metric.name} is a metric of the form"
    return None


def with_known_answer(
    settings: EvaluationSettings, rows: Sequence[TokenizedRow]
) -> list[TokenizedRow]:
    """Return the rows in a random order, by id; of a task with labels those whose answer is one."""
    known = {normal_label(label) for label in settings.labels}
    found = [row for row in rows if not known or normal_label(_answer(row)) in known]
    return sorted(found, key=lambda row: row["id"])


def fitted_rows(settings: EvaluationSettings, train: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    """Return the training rows that the candidates are scored on."""
    return with_known_answer(settings, train)[: settings.train_rows]


def most_frequent(train: Sequence[TokenizedRow]) -> str:
    """Return the most frequent answer of the training rows; of equal ones the first by text."""
    counts = Counter(_answer(row) for row in train)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _answer(row: TokenizedRow) -> str:
    return stored_reference(row)


def _spelling(train: Sequence[TokenizedRow]) -> dict[str, str]:
    """Return the most frequent spelling of each answer of the training rows."""
    found: dict[str, str] = {}
    for answer, _ in Counter(_answer(row) for row in train).most_common():
        found.setdefault(normal_label(answer), answer)
    return found


def rivals(
    base: Sequence[AskedRow], train: Sequence[TokenizedRow], scorer: Scorer
) -> dict[str, list[ScoredRow]]:
    """Score the rivals on the rows of the base, by the gate's metric.

    train: all training rows. A row that a rival cannot answer has no score. Not here: a rival with
    fewer than MIN_HELD_ROWS scores; all of them if the metric is not one of the answer.
    """
    majority, spelling = most_frequent(train), _spelling(train)
    found = {MAJORITY: scored([_always(row, majority) for row in base], scorer)}
    if scorer.settings.metric != "choice":  # by choice the base itself is held to the options
        held = [_held(row, spelling, scorer.settings.choice_per_token) for row in base]
        found[HELD] = scored(held, scorer)
    least = min(len(base), MIN_HELD_ROWS)
    return {
        name: rows
        for name, rows in found.items()
        if 0 < least <= sum(bool(row.scores) for row in rows)
    }


def scored(asked: Sequence[AskedRow | None], scorer: Scorer) -> list[ScoredRow]:
    """Score answers by the gate's metric alone; a row without an answer has no score."""
    given = [row for row in asked if row is not None and row.answer is not None]
    scores = iter(scorer.gate_scores(given) if given else [])
    blank = ScoredRow(scores={}, answered=False)
    return [
        blank if row is None or row.answer is None else blank.scored(next(scores)) for row in asked
    ]


def _always(row: AskedRow, answer: str) -> AskedRow | None:
    same = [normal_label(option.text) == normal_label(answer) for option in row.options]
    if row.options and not any(same):
        return None
    options = [
        replace(option, log_probability=0.0 if chosen else -1.0, tokens=1)
        for option, chosen in zip(row.options, same, strict=True)
    ]
    return replace(row, answer=GivenAnswer(answer, True, 0), options=options)


def _held(row: AskedRow, spelling: dict[str, str], per_token: bool) -> AskedRow | None:
    if not row.options:
        return None

    def likelihood(option: AskedOption) -> float:
        return option.log_probability / (option.tokens if per_token else 1)

    label = max(row.options, key=likelihood).text
    answer = spelling.get(normal_label(label), label)
    return replace(row, answer=GivenAnswer(answer, True, 0), options=[])
