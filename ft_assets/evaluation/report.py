"""Summarise scored rows as the numbers of an `EvalReport`."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.evaluation.report_model import (
    Comparisons,
    Difference,
    Differences,
    EvalReport,
    Evidence,
    Form,
    Harness,
    Retention,
    RivalCost,
    RivalReport,
    Scores,
    SeedSpread,
)
from ft_assets.evaluation.scored_rows import Scored, ScoredRow
from ft_assets.evaluation.verdict.seeds import seed_spread
from ft_assets.evaluation.verdict.spending import spent_confidence
from ft_assets.evaluation.verdict.statistics import compare, interval
from ft_assets.metrics import higher_is_better

BEHAVIOUR = ("refused", "repetition")  # compared as rates, not row by row
RIVALS = {
    "sft": ("base", "few_shot"),
    "dpo": ("base", "few_shot", "sft"),
    "rl": ("base", "few_shot", "sft", "dpo"),
}


def summarise(
    scored: Scored,
    settings: EvaluationSettings,
    gate: GateSettings,
    bound_to: Mapping[str, str],
    evidence: Evidence,
    verdict_number: int = 1,
) -> EvalReport:
    """Summarise the scored rows; `bound_to` and `evidence` are passed through.

    verdict_number: the how-manieth verdict on these held-out rows it is; each one after the first
    is judged at a higher confidence.
    """
    confidence = spent_confidence(gate.confidence, verdict_number)
    heldout = scored.heldout
    columns = {name: score_columns(rows) for name, rows in heldout.items()}
    metric = settings.metric
    # Only a user's own metric is not known by its name.
    lower = [name for name in settings.lower_is_better() if higher_is_better(name)]
    report = EvalReport(
        metric=metric,
        metrics=[name for name in columns["base"] if name not in BEHAVIOUR],
        heldout_rows=len(heldout["base"]),
        heldout_groups=len(set(clusters(heldout["base"]))),
        confidence=confidence,
        gate_confidence=gate.confidence,
        verdict_number=verdict_number,
        scores={name: _means(columns[name], heldout[name]) for name in columns},
        intervals={
            name: interval(
                columns[name][metric],
                confidence,
                settings.seed,
                clusters([row for row in rows if metric in row.scores]),
                metric not in _unbounded(settings),
            )
            for name, rows in heldout.items()
        },
        comparisons=_comparisons(heldout, settings, confidence),
        retention=_retention(scored.retention, settings, confidence),
        chance={
            name: compare(
                columns[name][metric],
                chance,
                confidence,
                settings.seed,
                metric in settings.lower_is_better(),
                clusters(heldout[name]),
                metric not in _unbounded(settings),
            )
            for name, chance in scored.chance.items()
            if chance
        },
        harness=_harness(scored.harness, settings, confidence),
        form=_form(scored, settings, confidence),
        seeds=_seeds(scored, settings, confidence),
        proofs=scored.proofs,
        evidence=evidence,
        bound_to=dict(bound_to),
    )
    return report.model_copy(update={"lower_is_better": lower}) if lower else report


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


def clusters(rows: Sequence[ScoredRow]) -> list[str]:
    """Return the key of each row's group; a row without one is a group of its own."""
    return [row.cluster or f"row {number}" for number, row in enumerate(rows)]


def _unbounded(settings: EvaluationSettings) -> set[str]:
    return {"loss", *(metric.name for metric in settings.measured() if not metric.bounded)}


def _comparisons(
    scored: Mapping[str, Sequence[ScoredRow]], settings: EvaluationSettings, confidence: float
) -> Comparisons:
    return {
        name: {
            rival: compare_rows(scored[name], scored[rival], settings, confidence)
            for rival in RIVALS[name]
            if rival in scored
        }
        for name in RIVALS
        if name in scored
    }


def compare_rows(
    rows: Sequence[ScoredRow],
    rivals: Sequence[ScoredRow],
    settings: EvaluationSettings,
    confidence: float,
    only: Collection[str] | None = None,
) -> Differences:
    """Return the paired difference of two candidates in each metric; positive means better.

    only: the metrics to compare; by default all that the rows have.
    """
    names = dict.fromkeys(name for row in rows for name in row.scores if name not in BEHAVIOUR)
    lower, unbounded = settings.lower_is_better(), _unbounded(settings)
    differences = {}
    for metric in names:
        if only is not None and metric not in only:
            continue
        # General prompts beyond `retention_answers` have a loss and no other score.
        pairs = [
            (row, rival)
            for row, rival in zip(rows, rivals, strict=True)
            if metric in row.scores and metric in rival.scores
        ]
        ours = [row.scores[metric] for row, _ in pairs]
        theirs = [rival.scores[metric] for _, rival in pairs]
        if metric == "human" and (direct := _asked_directly(pairs)):
            pairs, theirs = direct, [0.5] * len(direct)
            ours = [row.preferred[rival.answer] for row, rival in direct]
        differences[metric] = compare(
            ours,
            theirs,
            confidence,
            settings.seed,
            metric in lower,
            clusters([row for row, _ in pairs]),
            metric not in unbounded,
        )
    return differences


def _asked_directly(
    pairs: Sequence[tuple[ScoredRow, ScoredRow]],
) -> list[tuple[ScoredRow, ScoredRow]]:
    """Return the pairs that people compared with each other, not only with the base's answer."""
    return [(row, rival) for row, rival in pairs if rival.answer in row.preferred]


def _retention(
    retention: Mapping[str, Sequence[ScoredRow]], settings: EvaluationSettings, confidence: float
) -> Retention | None:
    if not retention.get("base"):
        return None
    columns = {name: score_columns(rows) for name, rows in retention.items()}
    return Retention(
        metric=settings.retention_metric,
        rows=len(retention["base"]),
        groups=len(set(clusters(retention["base"]))),
        answered=sum(row.answered for row in retention["base"]),
        scores={name: _means(columns[name], retention[name]) for name in columns},
        comparisons=_comparisons(retention, settings, confidence),
    )


def _seeds(
    scored: Scored, settings: EvaluationSettings, confidence: float
) -> dict[str, SeedSpread] | None:
    """Return the gains of the gate's metric over seeds; None if one seed was trained."""
    if not scored.seeds:
        return None
    metric, base = settings.metric, scored.heldout["base"]
    found = {}
    for name, further in scored.seeds.items():
        trained = [scored.heldout[name], *further]
        gains = [
            compare_rows(rows, base, settings, confidence, {metric})[metric].mean
            for rows in trained
        ]
        mean = [
            replace(row, scores={metric: statistics.fmean(one.scores[metric] for one in of_row)})
            for row, of_row in zip(trained[0], zip(*trained, strict=True), strict=True)
        ]
        over_rows = compare_rows(mean, base, settings, confidence, {metric})[metric]
        found[name] = seed_spread(gains, over_rows, confidence)
    return found


def _form(scored: Scored, settings: EvaluationSettings, confidence: float) -> Form | None:
    if not scored.rivals and scored.form_not_measured is None:
        return None
    metric = settings.metric

    def against(
        rows: Mapping[str, Sequence[ScoredRow]], rivals: Mapping[str, Sequence[ScoredRow]]
    ) -> dict[str, Differences]:
        return {
            name: {
                rival: compare_rows(rows[name], its, settings, confidence, {metric})[metric]
                for rival, its in rivals.items()
            }
            for name in RIVALS
            if name in rows
        }

    return Form(
        heldout=against(scored.heldout, scored.rivals),
        train=against(scored.train, scored.train_rivals),
        not_measured=scored.form_not_measured,
    )


def rival_report(
    rows: Sequence[ScoredRow],
    scored: Scored,
    settings: EvaluationSettings,
    confidence: float,
    cost: RivalCost,
    must_beat: bool,
) -> RivalReport:
    """Summarise the rows of a rival behind an endpoint, compared with each candidate."""
    metric, columns = settings.metric, score_columns(rows)
    return RivalReport(
        cost=cost,
        must_beat=must_beat,
        scores={
            **{name: statistics.fmean(values) for name, values in columns.items()},
            "stop_rate": statistics.fmean(float(row.stopped) for row in rows),
            "mean_tokens": statistics.fmean(row.tokens for row in rows),
        },
        interval=interval(
            columns[metric],
            confidence,
            settings.seed,
            clusters(rows),
            metric not in _unbounded(settings),
        ),
        comparisons={
            name: compare_rows(scored.heldout[name], rows, settings, confidence, {metric})[metric]
            for name in RIVALS
            if name in scored.heldout
        },
    )


def _harness(
    harness: Mapping[str, Mapping[str, list[float]]],
    settings: EvaluationSettings,
    confidence: float,
) -> Harness:
    return Harness(
        scores={
            name: {task: statistics.fmean(values) for task, values in tasks.items()}
            for name, tasks in harness.items()
        },
        comparisons={
            name: {
                rival: {
                    task: _compare_task(values, harness[rival][task], settings, confidence)
                    for task, values in harness[name].items()
                }
                for rival in RIVALS[name]
                if rival in harness
            }
            for name in RIVALS
            if name in harness
        },
    )


def _compare_task(
    values: list[float], rival: list[float], settings: EvaluationSettings, confidence: float
) -> Difference:
    bounded = all(0 <= value <= 1 for value in (*values, *rival))
    return compare(values, rival, confidence, settings.seed, bounded=bounded)
