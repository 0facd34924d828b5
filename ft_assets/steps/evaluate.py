"""Step: score the kept answers of all candidates, summarise, decide, explain.

It loads no model and no torch.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import JsonValue

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.data.mixing import is_copy, read_sources
from ft_assets.data.tables import read_table
from ft_assets.errors import ArtifactError
from ft_assets.evaluation.advice import ADVICE, Advice, advice_table, text_of
from ft_assets.evaluation.curves import up_to_kept
from ft_assets.evaluation.kept_answers import Answers, AskedRow
from ft_assets.evaluation.plots import data_uri, read_curve, score_plot
from ft_assets.evaluation.reachable import places, target, unscored
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.report_model import (
    EvalReport,
    Evidence,
    Finding,
    JudgeCalibration,
    RivalReport,
    ValidationLoss,
    Verdict,
    findings_json,
)
from ft_assets.evaluation.scored_rows import (
    RIVALS,
    Scored,
    ScoredRow,
    cluster_of,
    read_scores,
    write_scored_rows,
)
from ft_assets.evaluation.verdict.decision import decide
from ft_assets.evaluation.verdict.uses import Uses, look_key, prompt_digests, write_uses
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.review.win_rates import FILE, read_people_scores
from ft_assets.rows.types import TokenizedRow
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.evaluation.report_markdown import PreviousReport
    from ft_assets.evaluation.scorer import Task


class Settings(StepSettings):
    """`bound_to`: the versions that the report is about. `previous`: the folder of the last one.

    `rewards`: of RL. `uses`: the earlier verdicts on this base model.
    `raw_dataset`: the folder that has the lines of the rows, for messages. `own_rehearsal_rows`:
    the base's own answers that were trained, None without them.
    """

    STEP: ClassVar = Step("evaluate")

    evaluation: EvaluationSettings
    gate: GateSettings
    answer_schema: dict[str, JsonValue] | None
    has_dpo: bool
    bound_to: dict[str, str]
    raw_dataset: Path
    root: Path
    previous: Path | None
    uses: Uses
    min_judge_agreement: float = 0.0
    rewards: dict[str, float] | None = None
    own_rehearsal_rows: int | None = None


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.report import summarise
    from ft_assets.evaluation.report_markdown import report_markdown
    from ft_assets.evaluation.verdict.diagnosis import diagnose

    settings, gate = given.evaluation, given.gate
    answers = Answers.read(job.inputs["answers"])
    train = read_table(job.inputs["heldout_split"] / "train.parquet", row=TokenizedRow)
    task = _task(job, given, answers, train)
    _require_scores(task, given)
    scored = _scored(answers, task, report)
    _tell_form_apart(scored, answers, task, train)
    key = look_key(given.bound_to, gate.model_dump(mode="json"))
    prompts = prompt_digests(row["messages"][:-1] for row in task.heldout)
    numbers = summarise(
        scored,
        settings,
        gate,
        given.bound_to,
        _evidence(job, scored, answers, given, train),
        given.uses.number(key, prompts),
    )
    if (choice := answers.facts.few_shot) is not None:
        numbers = numbers.model_copy(update={"few_shot": choice})
    if (calibration := _calibration(job, given, scored, task)) is not None:
        numbers = numbers.model_copy(update={"calibration": calibration})
    if given.rewards:
        numbers = numbers.model_copy(update={"rewards": given.rewards})
    if settings.rivals:
        rows = _rivals(job, task)
        write_scored_rows(job.output / RIVALS, rows, task.heldout)
        found = _rival_reports(job, rows, scored, settings, numbers.confidence)
        numbers = numbers.model_copy(update={"rivals": found})
    if task.people:  # merged_model and release score answers again
        shutil.copyfile(job.inputs["human_review"] / FILE, job.output / FILE)
    verdict = decide(numbers, gate)
    findings = diagnose(numbers, verdict, gate)
    text = report_markdown(
        numbers, verdict, findings, scored.heldout, task.heldout, job.partition or ""
    )
    if (advice := _advice(job)) is not None:
        text += f"\n## Advice before the training\n\n{text_of(advice)}\n"
    (job.output / "report.json").write_text(numbers.to_json())
    (job.output / "verdict.json").write_text(verdict.to_json())
    (job.output / "diagnosis.json").write_text(findings_json(findings))
    (job.output / "report.md").write_text(text)
    write_scored_rows(job.output / "rows.parquet", scored.heldout, task.heldout)
    write_scored_rows(job.output / "retention.parquet", scored.retention, task.retention)
    _write_pages(job, given, numbers, verdict, findings, scored, task)
    write_uses(job.output, given.uses.after(key, prompts))
    return StepResult(_metrics(numbers, verdict, findings, scored, settings, answers))


def _task(job: Job, given: Settings, answers: Answers, train: list[TokenizedRow]) -> Task:
    from ft_assets.evaluation.scorer import Task

    asked = {row.id for row in answers.rows["train"].get("base", [])}

    settings, split = given.evaluation, job.inputs["heldout_split"]
    heldout = read_table(split / "heldout.parquet", row=TokenizedRow)
    retention = read_table(split / "retention.parquet", settings.retention_rows, row=TokenizedRow)
    return Task(
        heldout=_referenced(heldout, answers.rows["heldout"]["base"]),
        settings=settings,
        retention=_referenced(retention, answers.rows["retention"].get("base", [])),
        train=_referenced(
            [row for row in train if row["id"] in asked], answers.rows["train"].get("base", [])
        ),
        schema=given.answer_schema,
        root=given.root,
        people=read_people_scores(job.inputs["human_review"] / FILE)
        if "human_review" in job.inputs
        else {},
    )


def _require_scores(task: Task, given: Settings) -> None:
    """Raise EvaluationError with file and line if a metric cannot be reached on a reference.

    heldout_split has checked it, unless only this report is made for a changed metric.
    """
    unfit = unscored(
        [target(row, row["reference"]) for row in task.heldout],
        task.settings,
        given.gate,
        task.schema,
        partial(places, given.raw_dataset),
    )
    if unfit:
        raise unfit[0]


def _referenced(rows: list[TokenizedRow], asked: list[AskedRow]) -> list[ReferencedRow]:
    """Return the rows with the references of the answers, which are of the same rows."""
    of = {row.id: row.reference for row in asked}
    return [{**row, "reference": of[row["id"]]} for row in rows]


def _scored(answers: Answers, task: Task, report: Report) -> Scored:
    """Score the answers of every candidate."""
    from ft_assets.evaluation.scorer import Scorer

    scorer, metric = Scorer(task), task.settings.metric
    scored = Scored(
        harness={name: one.scores for name, one in answers.facts.harness.items()},
        train_loss={
            name: [row.loss for row in rows] for name, rows in answers.rows["train"].items() if rows
        },
        proofs=answers.facts.proofs,
    )
    for name, rows in answers.rows["heldout"].items():
        scored.heldout[name] = scorer.heldout(rows, scored.heldout.get("base"))
        mean = statistics.fmean(
            row.scores[metric] for row in scored.heldout[name] if metric in row.scores
        )
        report("scored", **{f"{name}_{metric}": round(mean, 4)})
        if name in answers.facts.proofs.adapters:  # candidates for the merge
            scored.chance[name] = scorer.chance(scored.heldout[name])
    for name, rows in answers.rows["seeds"].items():
        candidate = name.partition("_seed")[0]
        further = scored.seeds.setdefault(candidate, [])
        further.append(scorer.heldout(rows, scored.heldout["base"]))
    for name, rows in answers.rows["retention"].items():
        scored.retention[name] = scorer.retention(rows)
    scored.judge_orders = scorer.judge_orders
    return scored


def _calibration(job: Job, given: Settings, scored: Scored, task: Task) -> JudgeCalibration | None:
    """Compare the judge with people, on different answers that both compared with the base's."""
    from ft_assets.review.calibration import Compared, calibrated
    from ft_assets.review.win_rates import REVIEW, HumanReview

    if not (task.people and task.settings.judge):
        return None
    base = scored.heldout["base"]
    pairs = [
        Compared(
            cluster_of(row),
            one.scores["judge"],
            known[rival.answer],
            (len(one.answer) > len(rival.answer)) - (len(one.answer) < len(rival.answer)),
        )
        for name, rows in scored.heldout.items()
        if name != "base"
        for row, one, rival in zip(task.heldout, rows, base, strict=True)
        if one.answer != rival.answer
        and rival.answer in (known := task.people.get(row["id"], {}).get(one.answer, {}))
    ]
    return calibrated(
        pairs,
        scored.judge_orders,
        HumanReview.read(job.inputs["human_review"] / REVIEW).agreement,
        given.min_judge_agreement,
        given.gate.confidence,
        task.settings.seed,
    )


def _rivals(job: Job, task: Task) -> dict[str, list[ScoredRow]]:
    """Score the answers of the rivals."""
    from ft_assets.evaluation.rival_answers import TABLE, asked_rows, read_answers
    from ft_assets.evaluation.scorer import Scorer

    scorer, answers = Scorer(task), read_answers(job.inputs["rival_answers"] / TABLE)
    return {
        name: scorer.rival(asked_rows([one for one in answers if one.rival == name], task.heldout))
        for name in task.settings.rivals
    }


def _rival_reports(
    job: Job,
    rows: dict[str, list[ScoredRow]],
    scored: Scored,
    settings: EvaluationSettings,
    confidence: float,
) -> dict[str, RivalReport]:
    """Compare the candidates with the rivals."""
    from ft_assets.evaluation.report import rival_report
    from ft_assets.evaluation.rival_answers import COSTS, read_costs
    from ft_assets.evaluation.rivals import read_searches

    folder, found = job.inputs["rival_answers"], dict[str, RivalReport]()
    costs = read_costs(folder / COSTS)
    for name, rival in settings.rivals.items():
        its = rows[name], scored, settings, confidence, costs[name], rival.must_beat
        retrieved, searches = read_searches(folder, name)
        found[name] = rival_report(*its).model_copy(
            update={"retrieved": retrieved, "searches": searches}
        )
    return found


def _tell_form_apart(
    scored: Scored, answers: Answers, task: Task, train: list[TokenizedRow]
) -> None:
    """Score the rivals that have the form of an answer alone; they are added to `scored`."""
    from ft_assets.evaluation import form
    from ft_assets.evaluation.scorer import Scorer

    judged = [row for row in train if row["judged"]]
    scorer = Scorer(task)
    if form.has_few_answers(task.settings, judged):
        scored.rivals = form.rivals(answers.rows["heldout"]["base"], judged, scorer)
        base = answers.rows["train"]["base"]
        clusters = {row["id"]: cluster_of(row) for row in task.train}
        if scored.rivals and base:
            scored.train_rivals = form.rivals(base, judged, scorer)
            scored.train = {
                name: [
                    replace(one, cluster=clusters[row.id])
                    for one, row in zip(form.scored(rows, scorer), rows, strict=True)
                ]
                for name, rows in answers.rows["train"].items()
            }
    if form.is_json(task.settings) and "few_shot" in scored.heldout:
        scored.rivals[form.PROMPTED] = scored.heldout["few_shot"]
    if not scored.rivals:
        scored.form_not_measured = form.why_not_measured(task.settings)


def _evidence(
    job: Job,
    scored: Scored,
    answers: Answers,
    given: Settings,
    train: list[TokenizedRow],
) -> Evidence:
    """Collect the facts that the diagnosis needs besides the scores."""
    from ft_assets.evaluation.verdict.diagnosis import diversity

    general = [row.stopped for row in scored.retention.get("base", []) if row.answered]
    measured = read_curve(job.inputs["lora_adapter"], "validation")
    validation = up_to_kept(measured)
    curve = read_curve(job.inputs["lora_adapter"], "curve")
    rows = given.own_rehearsal_rows
    own = {} if rows is None else {"own_rehearsal_rows": rows}  # no key in other reports
    return Evidence(
        train=diversity([row for row in train if not is_copy(row["id"])]),
        train_loss={name: statistics.fmean(losses) for name, losses in scored.train_loss.items()},
        validation=[ValidationLoss.model_validate(point) for point in validation],
        vocabulary=answers.facts.vocabulary,
        general_stop_rate=statistics.fmean(general) if general else None,
        labels=len(given.evaluation.labels),
        kept_is_last=len(validation) == len(measured),
        steps=int(max(point["step"] for point in curve)) if curve else None,
        sources=read_sources(job.inputs["heldout_split"]),
        **own,
    )


def _write_pages(
    job: Job,
    given: Settings,
    numbers: EvalReport,
    verdict: Verdict,
    findings: Sequence[Finding],
    scored: Scored,
    task: Task,
) -> None:
    """Write the pages and pictures.

    They are in info/, because they compare with the previous report, which is not a part of the
    content.
    """
    from ft_assets.evaluation.report_html import report_html
    from ft_assets.evaluation.report_markdown import changes

    info = job.output / "info"
    info.mkdir()
    (info / "scores.txt").write_text(data_uri(score_plot(numbers)))
    try:
        previous = _previous(given.previous)
        since = changes(numbers, verdict, scored.heldout, task.heldout, previous)
    except ArtifactError as error:  # it must not keep this report from being made
        since = f"Not compared with the previous report: {error.where}: {error.found}."
    (info / "changes.md").write_text(since)
    curves = {
        "SFT loss": {
            "train": read_curve(job.inputs["lora_adapter"], "curve"),
            "validation": read_curve(job.inputs["lora_adapter"], "validation"),
        }
    }
    if given.has_dpo:
        curves["DPO loss"] = {"train": read_curve(job.inputs["dpo_adapter"], "curve")}
    if "rl_adapter" in job.inputs:
        steps = read_curve(job.inputs["rl_adapter"], "curve")
        curves["RL reward"] = {"train": [{**step, "loss": step["reward"]} for step in steps]}
    page = report_html(
        numbers,
        verdict,
        findings,
        scored.heldout,
        task.heldout,
        job.partition or "",
        curves,
        since,
        job.output / "rows.parquet",
        [(f"Advice before the training: {advice.outcome}", advice_table(advice))]
        if (advice := _advice(job)) is not None
        else [],
    )
    (info / "report.html").write_text(page, encoding="utf-8")


def _advice(job: Job) -> Advice | None:
    """Return the advice before the training, None if the project does not ask for it."""
    return Advice.read(job.inputs["advice"] / ADVICE) if "advice" in job.inputs else None


def _previous(folder: Path | None) -> PreviousReport | None:
    from ft_assets.evaluation.report_markdown import PreviousReport

    if folder is None or not (folder / "report.json").exists():
        return None
    report = EvalReport.read(folder / "report.json")
    return PreviousReport(
        report=report,
        verdict=Verdict.read(folder / "verdict.json"),
        scores=read_scores(folder / "rows.parquet", report.metric),
    )


def _metrics(
    numbers: EvalReport,
    verdict: Verdict,
    findings: Sequence[Finding],
    scored: Scored,
    settings: EvaluationSettings,
    answers: Answers,
) -> dict[str, Any]:
    best, metric, rows = verdict.reported_candidate, settings.metric, scored.heldout
    general = numbers.retention.comparisons[best]["base"] if numbers.retention else None
    return {
        "verdict": verdict.status,
        "candidate": verdict.candidate or "none",
        "reason": "; ".join(verdict.reasons),
        "diagnosis": ", ".join(finding.cause for finding in findings) or "–",
        "heldout_rows": numbers.heldout_rows,
        "verdict_number": numbers.verdict_number,
        **{f"{name}_{metric}": round(numbers.scores[name][metric], 4) for name in rows},
        "gain_vs_base": round(numbers.comparisons[best]["base"][metric].mean, 4),
        "stop_rate": round(numbers.scores[best]["stop_rate"], 4),
        **({"retention_loss_rise": round(-general["loss"].mean, 4)} if general else {}),
        **answers.cost.metrics(),
    }


if __name__ == "__main__":
    main(step)
