"""Evaluation reports of given numbers, for tests and benches."""

from typing import Any

from ft_assets.evaluation.report_model import (
    Diversity,
    EvalReport,
    Evidence,
    Harness,
    Proofs,
)
from ft_assets.evaluation.scored_rows import ScoredRow

EVIDENCE = Evidence(
    train=Diversity(rows=1, distinct_prompts=1.0, answer_entropy_bits=0.0, top_answer=1.0),
    train_loss={},
    validation=[],
    vocabulary=1000,
    general_stop_rate=None,
    labels=0,
)


def scored_row(answer: str, **scores: float) -> ScoredRow:
    """Return a held-out row with an answer that stopped by itself, and its scores."""
    behaviour = {"refused": 0.0, "repetition": 0.0}
    likelihood = {"loss": 1.0, "token_accuracy": 0.5}
    return ScoredRow(
        scores={**behaviour, **scores, **likelihood},
        answer=answer,
        stopped=True,
        tokens=len(answer.split()),
    )


def empty_report(**parts: Any) -> EvalReport:
    """Return a report about `exact` without scores, with the given parts replaced."""
    report = EvalReport(
        metric="exact",
        metrics=["exact"],
        heldout_rows=0,
        confidence=0.95,
        scores={},
        intervals={},
        comparisons={},
        retention=None,
        chance={},
        harness=Harness(scores={}, comparisons={}),
        proofs=Proofs(adapters={}, template_mismatches=[]),
        evidence=EVIDENCE,
        bound_to={},
    )
    return report.model_copy(update=parts)
