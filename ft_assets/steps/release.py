"""Step: score champion and challenger, read from disk, on today's held-out rows, and decide which one is released."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow.parquet as pq

from ft_assets.artifacts import Artifact, verify_files
from ft_assets.config import EvaluationSettings, GateSettings, ReleaseSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import ReleaseError
from ft_assets.evaluation.references import with_references
from ft_assets.evaluation.report_model import Differences
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.release.champion import PROMOTED, Model, State, decide_release, stands, write_release
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.evaluation.candidates import Rows, Task


class Settings(StepSettings):
    """`state`: the release before. `at` and `run_id`: when and by which run the decision is made."""

    STEP: ClassVar = Step("release", gpu=True)

    release: ReleaseSettings
    gate: GateSettings
    evaluation: EvaluationSettings
    answer_schema: dict[str, Any] | None
    root: Path
    state: State
    challenger: Model
    at: str
    run_id: str


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.candidates import Task
    from ft_assets.evaluation.report import compare_columns, score_columns

    settings, gate, rule = given.evaluation, given.gate, given.release
    before, metric = given.state, settings.metric
    for name in ("merged_model", "champion"):
        verify_files(Artifact.read(job.inputs[name]))
    heldout = with_references(
        load_tokenizer(job.inputs["base_model"]),
        read_table(job.inputs["heldout_split"] / "heldout.parquet"),
    )
    rows = unseen(heldout, job.inputs["champion_adapter"], f"release[{job.partition}]")
    if len(rows) < gate.min_heldout_rows:
        raise ReleaseError(
            where=f"release[{job.partition}]",
            found=f"the champion was trained on {len(heldout) - len(rows)} of today's {len(heldout)} held-out rows; {len(rows)} are left",
            expected=f"at least {gate.min_heldout_rows} rows that neither model has seen (gate.min_heldout_rows)",
            fix="add held-out rows, or set the split back to what it was",
        )
    base = judged_rows(job.inputs["eval_report"], "base", rows)
    task = Task(rows, [], [], [], None, settings, given.answer_schema, given.root)
    scored = {
        name: _score(job.inputs[path], task, base)
        for name, path in (("champion", "champion"), ("challenger", "merged_model"))
    }
    for name, its in scored.items():
        report(name, **{metric: round(statistics.fmean(row[metric] for row in its), 4)})

    def compare(one: Rows, other: Rows) -> Differences:
        measured = {
            name: values
            for name, values in score_columns(one).items()
            if name in settings.metric_names()
        }
        return compare_columns(measured, score_columns(other), settings, gate)

    against, today = (
        compare(scored["challenger"], scored["champion"]),
        {name: compare(its, base) for name, its in scored.items()},
    )
    challenger, old = given.challenger, before.champion
    assert old is not None, "the step compares with a champion"
    decision = decide_release(
        against, today["champion"], today["challenger"], metric, gate, rule, challenger["override"]
    )
    champion = challenger if decision.status == PROMOTED else old
    serving = today["challenger" if decision.status == PROMOTED else "champion"]
    numbers = {
        "rows": len(rows),
        "rows_the_champion_was_trained_on": len(heldout) - len(rows),
        "scores": {
            name: statistics.fmean(row[metric] for row in its) for name, its in scored.items()
        },
        "challenger_against_champion": against[metric].to_dict(),
        **{f"{name}_against_base": entries[metric].to_dict() for name, entries in today.items()},
    }
    stamp = {"at": given.at, "run_id": given.run_id}
    write_release(
        job.output, before, decision, champion, challenger, {**stamp, "comparison": numbers}
    )
    return StepResult(
        {
            "decision": decision.status,
            "reason": "; ".join(decision.reasons),
            "champion": champion["merged_model"],
            "sequence": before.sequence + 1,
            "heldout_rows": len(rows),
            "rows_left_out": len(heldout) - len(rows),
            **{f"{name}_{metric}": round(value, 4) for name, value in numbers["scores"].items()},
            "champion_gain_mean": round(serving[metric].mean, 4),
            "champion_gain_low": round(serving[metric].low, 4),
            "champion_gain_high": round(serving[metric].high, 4),
            "champion_beats_base": stands(serving, metric, gate)[0],
            "measured_today": True,
        },
        {"champion": champion["identity"]},
    )


def unseen(rows: Rows, adapter: Path, where: str) -> Rows:
    """Return the rows that a former champion's adapter was not trained on: a changed split may have moved them. Raises
    ReleaseError if it does not say which these were."""
    from ft_assets.models.adapter_files import TRAINED_GROUPS

    try:
        seen = set(json.loads((adapter / TRAINED_GROUPS).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        raise ReleaseError(
            where=where,
            found=f"the champion's adapter does not say which rows it was trained on ({adapter / TRAINED_GROUPS})",
            expected="the list that its training wrote",
            fix=f"restore the file from a backup; or remove {where.replace('[', '/').rstrip(']')} from the store: a new history then begins "
            "with today's model",
        ) from None
    return [row for row in rows if row["group"] not in seen]


def judged_rows(report: Path, candidate: str, rows: Rows) -> Rows:
    """Return the evaluation's scored rows of one candidate, in the order of `rows`."""
    table = pq.read_table(report / "rows.parquet", filters=[("candidate", "=", candidate)])
    found = {row["id"]: row for row in table.to_pylist()}
    return [found[row["id"]] for row in rows]


def _score(folder: Path, task: Task, base: Rows) -> Rows:
    """Return a merged model's own scored rows, with its own tokenizer and template."""
    from ft_assets.evaluation.candidates import Scorer

    scorer = Scorer(load_base(folder), load_tokenizer(folder), stop_ids(folder), task)
    return scorer.heldout(scorer.tokenized(task.heldout), base)


if __name__ == "__main__":
    main(step)
