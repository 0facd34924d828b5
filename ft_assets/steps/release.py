"""Step: score champion and challenger on today's held-out rows, and decide the release."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import JsonValue

from ft_assets.config import EvaluationSettings, GateSettings, ReleaseSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import ReleaseError
from ft_assets.evaluation.behaviour import refusal_pattern
from ft_assets.evaluation.drift_model import Drift
from ft_assets.evaluation.references import with_references
from ft_assets.evaluation.report_model import Differences, EvalReport
from ft_assets.evaluation.scored_rows import (
    PeopleScores,
    ScoredRow,
    cluster_of,
    read_scored_rows,
)
from ft_assets.evaluation.verdict.spending import gate_of
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.release.champion import Measured, beats_base, decide_release
from ft_assets.release.register import (
    PROMOTED,
    PROPOSED,
    Comparison,
    Decision,
    HistoryEntry,
    ReleasedModel,
    ReleaseState,
    entry_metrics,
    write_release,
)
from ft_assets.review.win_rates import FILE, read_people_scores
from ft_assets.rows.types import ConversationRow, DataRow, Message, TokenizedRow
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.evaluation.asker import Asker
    from ft_assets.evaluation.references import ReferencedRow
    from ft_assets.evaluation.scorer import Task

Side = Literal["champion", "challenger"]
INPUTS: dict[Side, str] = {"champion": "champion", "challenger": "merged_model"}
DIGITS = 4  # of the manifest's metrics
REAL_PROMPTS = 100  # of production that both models answer
Answered = dict[str, ScoredRow]  # by the id of the row


class Settings(StepSettings):
    """`state`: before this decision. `lapsed`: a sentence about the proposal before it.

    `at`, `run_id`: the time and the run of this decision.
    """

    STEP: ClassVar = Step("release", gpu=True)

    release: ReleaseSettings
    gate: GateSettings
    evaluation: EvaluationSettings
    answer_schema: dict[str, JsonValue] | None
    root: Path
    state: ReleaseState
    challenger: ReleasedModel
    lapsed: str | None = None
    at: str
    run_id: str
    production: Path | None = None  # the table of data.production


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    where = f"release[{job.partition}]"
    metric = settings.evaluation.metric
    tokenizer = load_tokenizer(job.inputs["base_model"])
    table = job.inputs["heldout_split"] / "heldout.parquet"
    heldout = with_references(tokenizer, read_table(table, row=TokenizedRow))
    rows = unseen(heldout, job.inputs["champion_adapter"], where)
    require_enough(rows, len(heldout), settings.gate, where)
    evaluation = EvalReport.read(job.inputs["eval_report"] / "report.json")
    settings = settings.model_copy(update={"gate": gate_of(evaluation, settings.gate)})
    base = read_scored_rows(job.inputs["eval_report"] / "rows.parquet", "base", rows)
    task = _task(rows, settings, read_people_scores(job.inputs["eval_report"] / FILE))
    real = _production(settings.production)
    models: dict[Side, tuple[list[ScoredRow], Answered]] = {
        side: _score(job.inputs[name], task, base, real) for side, name in INPUTS.items()
    }
    scored: dict[Side, list[ScoredRow]] = {side: found for side, (found, _) in models.items()}
    scores = {
        side: statistics.fmean(row.scores[metric] for row in its if metric in row.scores)
        for side, its in scored.items()
    }
    for side, value in scores.items():
        report(side, **{metric: round(value, DIGITS)})
    measured = _measure(scored, base, settings)
    override = settings.challenger.override
    decision = decide_release(measured, metric, settings.gate, settings.release, override)
    comparison = Comparison(
        rows=len(rows),
        rows_the_champion_was_trained_on=len(heldout) - len(rows),
        scores={str(side): value for side, value in scores.items()},
        challenger_against_champion=measured.against[metric],
        champion_against_base=measured.champion[metric],
        challenger_against_base=measured.challenger[metric],
        drift=_drift(rows, models, settings),
    )
    entry = _entry(settings, decision, comparison)
    write_release(job.output, settings.state, entry)
    metrics = _metrics(entry, comparison, measured, settings)
    return StepResult(metrics, {"champion": entry.subject.identity})


def require_enough(
    unseen_rows: Sequence[DataRow], rows: int, gate: GateSettings, where: str
) -> None:
    """Raise ReleaseError unless enough groups of the `rows` held-out rows are unseen."""
    groups, left = len({cluster_of(row) for row in unseen_rows}), len(unseen_rows)
    if groups >= gate.min_heldout_rows:
        return
    trained = f"the champion was trained on {rows - left} of today's {rows} held-out rows"
    least = f"at least {gate.min_heldout_rows} groups of rows that neither model has seen"
    raise ReleaseError(
        where=where,
        found=f"{trained}; {left} rows in {groups} groups are left",
        expected=f"{least} (gate.min_heldout_rows)",
        fix="add held-out rows, or set the split back to its former settings",
    )


def _task(rows: list[ReferencedRow], settings: Settings, people: PeopleScores) -> Task:
    from ft_assets.evaluation.scorer import Task

    return Task(
        heldout=rows,
        settings=settings.evaluation,
        schema=settings.answer_schema,
        root=settings.root,
        people=people,
    )


def _measure(
    scored: dict[Side, list[ScoredRow]], base: list[ScoredRow], settings: Settings
) -> Measured:
    """Compare champion, challenger and base, row by row."""
    from ft_assets.evaluation.report import compare_rows

    evaluation = settings.evaluation

    def compare(one: list[ScoredRow], other: list[ScoredRow]) -> Differences:
        confidence = settings.gate.confidence
        return compare_rows(one, other, evaluation, confidence, evaluation.metric_names())

    return Measured(
        against=compare(scored["challenger"], scored["champion"]),
        champion=compare(scored["champion"], base),
        challenger=compare(scored["challenger"], base),
    )


def _entry(settings: Settings, decision: Decision, comparison: Comparison) -> HistoryEntry:
    before = settings.state
    assert before.champion is not None, "the step compares with a champion"
    is_promoted = decision.status == PROMOTED
    held = is_promoted and settings.release.approval == "required"
    return HistoryEntry(
        sequence=before.sequence + 1,
        decision=PROPOSED if held else decision.status,
        reasons=[*decision.reasons, *([settings.lapsed] if settings.lapsed else [])],
        champion=settings.challenger if is_promoted and not held else before.champion,
        challenger=settings.challenger,
        at=settings.at,
        run_id=settings.run_id,
        comparison=comparison,
        proposes=PROMOTED if held else None,
    )


def _metrics(
    entry: HistoryEntry, comparison: Comparison, measured: Measured, settings: Settings
) -> dict[str, float | str]:
    """Return the manifest's metrics; the gain is that of the champion after the decision."""
    metric = settings.evaluation.metric
    against_base = measured.challenger if entry.decision == PROMOTED else measured.champion
    gain = against_base[metric]
    proposed: dict[str, float | str] = {}
    if entry.decision == PROPOSED:
        its = measured.challenger[metric]
        proposed = {
            f"challenger_gain_{key}": round(value, DIGITS)
            for key, value in (("mean", its.mean), ("low", its.low), ("high", its.high))
        }
        passed = beats_base(measured.challenger, metric, settings.gate)[0]
        proposed["challenger_beats_base"] = passed
    return {
        **entry_metrics(entry),
        **proposed,
        "heldout_rows": comparison.rows,
        "rows_left_out": comparison.rows_the_champion_was_trained_on,
        **{f"{side}_{metric}": round(value, DIGITS) for side, value in comparison.scores.items()},
        "champion_gain_mean": round(gain.mean, DIGITS),
        "champion_gain_low": round(gain.low, DIGITS),
        "champion_gain_high": round(gain.high, DIGITS),
        **{
            f"answers_changed_{drift.prompts.replace('-', '_')}": round(drift.changed.mean, DIGITS)
            for drift in comparison.drift
        },
        "champion_beats_base": beats_base(against_base, metric, settings.gate)[0],
        "measured_today": True,
    }


def unseen(rows: list[ReferencedRow], adapter: Path, where: str) -> list[ReferencedRow]:
    """Return the rows that an adapter was not trained on; a changed split may have moved them.

    Raises ReleaseError if the adapter's list of training rows cannot be read.
    """
    from ft_assets.models.adapter_files import TRAINED_GROUPS

    path = adapter / TRAINED_GROUPS
    try:
        seen = set(json.loads(path.read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        folder = where.replace("[", "/").rstrip("]")
        raise ReleaseError(
            where=where,
            found=f"the champion's adapter does not have the list of its training rows ({path})",
            expected="the list that its training wrote",
            fix=f"restore the file from a backup; or remove {folder} from the store: a new history "
            "then begins with today's model",
        ) from None
    return [row for row in rows if row["group"] not in seen]


def _score(
    folder: Path, task: Task, base: list[ScoredRow], real: list[TokenizedRow]
) -> tuple[list[ScoredRow], Answered]:
    """Score a merged model with its own tokenizer and template, and answer real prompts."""
    from ft_assets.evaluation.asker import Asker, tokenized
    from ft_assets.evaluation.scorer import Scorer

    asker = Asker(load_base(folder), load_tokenizer(folder), stop_ids(folder), task)
    scored = Scorer(task).heldout(asker.heldout(tokenized(asker.renderer, task.heldout)), base)
    return scored, _answered(asker, real)


def _production(path: Path | None) -> list[TokenizedRow]:
    """Return some prompts of production, each with an answer's place."""
    if path is None or not path.exists():
        return []
    rows = sorted(read_table(path, row=ConversationRow), key=lambda row: row["id"])
    return [_unanswered(row) for row in rows[:REAL_PROMPTS]]


def _unanswered(row: ConversationRow) -> TokenizedRow:
    place: Message = {"role": "assistant", "content": ""}
    messages, none = [*row["messages"], place], {"judged": True, "input_ids": [], "supervised": []}
    return cast(TokenizedRow, {**row, **none, "messages": messages})


def _answered(asker: Asker, rows: list[TokenizedRow]) -> Answered:
    """Return the answers by row; a prompt that this model cannot be given has none."""
    from ft_assets.chat.rendering import ProofFailed

    asked: list[TokenizedRow] = [{**row, "messages": row["messages"][:-1]} for row in rows]
    fitting = [
        row
        for row, ids in zip(rows, asker.renderer.prompts(asked), strict=True)
        if not isinstance(ids, ProofFailed) and not asker.room.rows_error({row["id"]: len(ids)})
    ]
    refusal = refusal_pattern(asker.settings.refusals)
    return {
        row["id"]: ScoredRow(
            {"refused": float(bool(refusal.search(given.text)))},
            given.text,
            given.stopped,
            given.tokens,
            cluster=row["group"],
        )
        for row, given in zip(fitting, asker.answers(fitting), strict=True)
    }


def _drift(
    rows: list[ReferencedRow],
    models: dict[Side, tuple[list[ScoredRow], Answered]],
    settings: Settings,
) -> list[Drift]:
    """Compare the answers of both models to held-out rows, and to those of production."""
    from ft_assets.evaluation.drift import drift_of  # imports scipy: the graph loads without it

    (before, old), (after, new) = models["champion"], models["challenger"]
    found = [drift_of([row["id"] for row in rows], before, after, settings.gate, "held-out")]
    if both := [row for row in old if row in new]:
        real = [old[row] for row in both], [new[row] for row in both]
        found.append(drift_of(both, *real, settings.gate, "production"))
    return found


if __name__ == "__main__":
    main(step)
