"""The report with a merged file in its adapter's place, for a file that was not evaluated.

The evaluation judges an adapter on the base's 16-bit weights. Merged onto NF4-dequantized weights
the model can answer differently, also on general prompts, so its forgetting has not been measured.
"""

from pathlib import Path

from ft_assets.config import GateSettings
from ft_assets.evaluation.asker import Asker
from ft_assets.evaluation.harness import harness_scores
from ft_assets.evaluation.report import compare_rows, summarise
from ft_assets.evaluation.report_model import EvalReport, RivalReport
from ft_assets.evaluation.scored_rows import (
    Scored,
    ScoredRow,
    read_rivals,
    read_scored_rows,
)
from ft_assets.evaluation.scorer import Scorer, Task
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids


def report_of_file(
    file: Path,
    snapshot: Path,
    task: Task,
    rows: list[ScoredRow],
    report: Path,
    candidate: str,
    gate: GateSettings,
) -> EvalReport:
    """Return the report in `report`, with the numbers of `candidate` replaced by the file's.

    rows: the file's scored held-out rows. The general prompts and the tasks of
    lm-evaluation-harness are scored here. The base's tasks are scored again, because a report does
    not keep the score of each document.
    """
    before = EvalReport.read(report / "report.json")
    own = _score_file(file, task, rows, candidate, before.retention is not None)
    if own.harness:
        base, tokenizer = load_base(snapshot), load_tokenizer(snapshot)
        scores = harness_scores(base, tokenizer, task.settings, task.root)
        own.harness = {"base": scores, **own.harness}
    general = before.retention.scores if before.retention else {}
    own.heldout = {
        name: own.heldout.get(name) or read_scored_rows(report / "rows.parquet", name, task.heldout)
        for name in before.scores
    }
    own.retention = {
        name: own.retention.get(name)
        or read_scored_rows(report / "retention.parquet", name, task.retention)
        for name in general
    }
    own.proofs = before.proofs
    numbers = summarise(own, task.settings, gate, before.bound_to, before.evidence)
    # Form and seeds were measured of the adapter; those answers are not in the report.
    carried = {
        "chance": {**before.chance, **numbers.chance},
        "form": before.form,
        "seeds": before.seeds,
        "few_shot": before.few_shot,
        "rewards": before.rewards,
        "calibration": before.calibration,
        "rivals": before.rivals and _rivals(before.rivals, candidate, rows, report, task, numbers),
    }
    return numbers.model_copy(update=carried)


def _rivals(
    before: dict[str, RivalReport],
    candidate: str,
    rows: list[ScoredRow],
    report: Path,
    task: Task,
    numbers: EvalReport,
) -> dict[str, RivalReport]:
    """Return the rivals, compared with the file in its adapter's place."""
    metric, confidence = numbers.metric, numbers.confidence
    found, scored = dict[str, RivalReport](), read_rivals(report, before, task.heldout)
    for name, rival in before.items():
        its = scored[name]
        entry = compare_rows(rows, its, task.settings, confidence, {metric})[metric]
        comparisons = {**rival.comparisons, candidate: entry}
        found[name] = rival.model_copy(update={"comparisons": comparisons})
    return found


def _score_file(
    file: Path, task: Task, rows: list[ScoredRow], candidate: str, with_general: bool
) -> Scored:
    """Score the merged file; the model is freed on return, so that one is in memory at a time."""
    asker, scorer = Asker(load_base(file), load_tokenizer(file), stop_ids(file), task), Scorer(task)
    scored = Scored(heldout={candidate: rows}, chance={candidate: scorer.chance(rows)})
    if with_general:
        scored.retention[candidate] = scorer.retention(asker.retention(task.retention))
    if task.settings.lm_eval:
        scored.harness[candidate] = harness_scores(
            asker.model, asker.tokenizer, task.settings, task.root
        )
    return scored
