"""Summarise scored rows as the numbers of an `EvalReport`."""

import math
import statistics
from collections.abc import Mapping, Sequence

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.evaluation.report_model import (
    Comparisons,
    Differences,
    EvalReport,
    Evidence,
    Harness,
    Retention,
    Scores,
)
from ft_assets.evaluation.scored_rows import Scored, ScoredRow
from ft_assets.evaluation.verdict.statistics import compare, interval
from ft_assets.metrics import higher_is_better

BEHAVIOUR = ("refused", "repetition")  # compared as rates, not row by row
RIVALS = {"sft": ("base", "few_shot"), "dpo": ("base", "few_shot", "sft")}


def summarise(
    scored: Scored,
    settings: EvaluationSettings,
    gate: GateSettings,
    bound_to: Mapping[str, str],
    evidence: Evidence,
) -> EvalReport:
    """Summarise the scored rows; `bound_to` and `evidence` are passed through."""
    columns = {name: score_columns(rows) for name, rows in scored.heldout.items()}
    metric = settings.metric
    # Only a user's own metric is not known by its name.
    lower = [name for name in settings.lower_is_better() if higher_is_better(name)]
    optional = {"lower_is_better": lower} if lower else {}
    return EvalReport(
        metric=metric,
        metrics=[name for name in columns["base"] if name not in BEHAVIOUR],
        heldout_rows=len(scored.heldout["base"]),
        confidence=gate.confidence,
        scores={name: _means(columns[name], scored.heldout[name]) for name in columns},
        intervals={
            name: interval(values[metric], gate.confidence, settings.seed)
            for name, values in columns.items()
        },
        comparisons=_comparisons(columns, settings, gate),
        retention=_retention(scored.retention, settings, gate),
        chance={
            name: compare(
                columns[name][metric],
                chance,
                gate.confidence,
                settings.seed,
                metric in settings.lower_is_better(),
            )
            for name, chance in scored.chance.items()
            if chance
        },
        harness=_harness(scored.harness, settings, gate),
        proofs=scored.proofs,
        evidence=evidence,
        bound_to=dict(bound_to),
        **optional,
    )


def score_columns(rows: Sequence[ScoredRow]) -> dict[str, list[float]]:
    """Return {metric: scores}, of the rows that have the metric."""
    names = dict.fromkeys(name for row in rows for name in row.scores)
    return {name: [row.scores[name] for row in rows if name in row.scores] for name in names}


def _means(columns: Mapping[str, list[float]], rows: Sequence[ScoredRow]) -> Scores:
    answered = [row for row in rows if row.answered]
    means = {name: statistics.fmean(values) for name, values in columns.items()}
    means["perplexity"] = math.exp(min(means["loss"], 700.0))  # e^710 overflows a float
    means["stop_rate"] = statistics.fmean(float(row.stopped) for row in answered)
    means["mean_tokens"] = statistics.fmean(row.tokens for row in answered)
    return means


def _comparisons(
    columns: Mapping[str, Mapping[str, list[float]]],
    settings: EvaluationSettings,
    gate: GateSettings,
) -> Comparisons:
    return {
        name: {
            rival: compare_columns(columns[name], columns[rival], settings, gate)
            for rival in RIVALS[name]
            if rival in columns
        }
        for name in RIVALS
        if name in columns
    }


def compare_columns(
    columns: Mapping[str, list[float]],
    rival: Mapping[str, list[float]],
    settings: EvaluationSettings,
    gate: GateSettings,
) -> Differences:
    """Return the paired difference of two candidates in each metric; positive means better."""
    lower = settings.lower_is_better()
    return {
        metric: compare(values, rival[metric], gate.confidence, settings.seed, metric in lower)
        for metric, values in columns.items()
        if metric not in BEHAVIOUR
    }


def _retention(
    retention: Mapping[str, Sequence[ScoredRow]], settings: EvaluationSettings, gate: GateSettings
) -> Retention | None:
    if not retention.get("base"):
        return None
    columns = {name: score_columns(rows) for name, rows in retention.items()}
    return Retention(
        metric=settings.retention_metric,
        rows=len(retention["base"]),
        answered=sum(row.answered for row in retention["base"]),
        scores={name: _means(columns[name], retention[name]) for name in columns},
        comparisons=_comparisons(columns, settings, gate),
    )


def _harness(
    harness: Mapping[str, Mapping[str, list[float]]],
    settings: EvaluationSettings,
    gate: GateSettings,
) -> Harness:
    return Harness(
        scores={
            name: {task: statistics.fmean(values) for task, values in tasks.items()}
            for name, tasks in harness.items()
        },
        comparisons=_comparisons(harness, settings, gate),
    )
