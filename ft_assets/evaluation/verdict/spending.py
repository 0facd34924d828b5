"""The confidence of repeated verdicts on the same held-out rows: alpha spending by a fixed series.

Each verdict on the same rows is a further chance of a false PASS, also if only the model changes:
the rows that favour it by luck stay the same. The first verdict is judged at the gate's confidence
and costs 1 - confidence. All later ones together cost as much again: the k-th has the share
6 / (π² (k - 1)²) of it, a series whose sum is 1 (Bonferroni with unequal weights; the use of a
series for tests without end is Foster and Stine 2008, JRSS B 70:429). The chance of one or more
false PASS on the same rows is at most 2 (1 - confidence) / 2, because only one side can pass.
"""

import math

from ft_assets.config import GateSettings
from ft_assets.evaluation.report_model import EvalReport


def spent_confidence(confidence: float, number: int) -> float:
    """Return the confidence of the `number`-th verdict on the same rows, counted from 1."""
    if number <= 1:
        return confidence
    return 1 - (1 - confidence) * 6 / (math.pi**2 * (number - 1) ** 2)


def gate_of(report: EvalReport, gate: GateSettings) -> GateSettings:
    """Return the gate at the report's confidence, for further comparisons on the same rows."""
    return gate.model_copy(update={"confidence": report.confidence})
