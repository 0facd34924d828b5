"""Metrics of an answer that must be one of a closed set of labels."""

from ft_assets.errors import EvaluationError
from ft_assets.metrics.equality import composed
from ft_assets.metrics.registry import Metric


@Metric("label", binary=True, config="labels")
def label(answers: list[str], references: list[str], labels: list[str]) -> list[float]:
    """Score 1 if the answer is the reference, but for case, blanks and a final full stop."""
    _require_labels(references, labels)
    return [
        float(normal_label(answer) == normal_label(reference))
        for answer, reference in zip(answers, references, strict=True)
    ]


@Metric("known_label", binary=True, needs_reference=False, config="labels")
def known_label(answers: list[str], labels: list[str]) -> list[float]:
    """Score 1 if the answer is any of the labels."""
    known = {normal_label(label) for label in labels}
    return [float(normal_label(answer) in known) for answer in answers]


@Metric("choice", binary=True, config="choice", of_answer=False)
def choice(
    log_probabilities: list[list[float]], references: list[str], options: list[list[str]]
) -> list[float]:
    """Score 1 if the reference is the most likely option of its row.

    log_probabilities: for each row one number for each of its options, over the option's tokens and
    the end of turn.
    """
    scores = []
    for row, reference, offered in zip(log_probabilities, references, options, strict=True):
        picked = max(range(len(row)), key=row.__getitem__)
        scores.append(float(picked == option_index(reference, offered)))
    return scores


def option_index(reference: str, options: list[str]) -> int:
    """Return the place of the reference among the options of its row.

    Case, quotes and a final full stop count only if options differ by nothing else. Raises
    EvaluationError if the reference is not exactly one of at least two options.
    """
    for form in (normal_label, _stripped):
        known = [form(option) for option in options]
        if len(known) > 1 and len(set(known)) == len(known) and form(reference) in known:
            return known.index(form(reference))
    raise EvaluationError(
        where="a held-out row",
        found=f"the reference is {reference[:80]!r} and the options are {str(options)[:160]}",
        expected="two or more different options, one of which is the reference",
        fix="correct the row's options, or choice in evaluation",
    )


def _stripped(text: str) -> str:
    return composed(text.strip())


def normal_label(text: str) -> str:
    """Return a label in NFC, without case, outer blanks, quotes and a final full stop."""
    return " ".join(composed(text.casefold()).split()).strip("\"'. ")


def _require_labels(references: list[str], labels: list[str]) -> None:
    """Raise EvaluationError unless every reference is one of the labels."""
    known = {normal_label(label) for label in labels}
    for index, reference in enumerate(references):
        if normal_label(reference) not in known:
            raise EvaluationError(
                where=f"held-out row {index}",
                found=f"the reference is {reference[:80]!r}",
                expected=f"one of the {len(labels)} labels of evaluation.labels",
                fix="correct the row, or evaluation.labels",
            )
