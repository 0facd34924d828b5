"""Step: merge the proven adapter, reload the result from disk, compare it with base + adapter, and score the file itself."""

import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import VerdictError
from ft_assets.evaluation.candidates import Rows, Task
from ft_assets.evaluation.references import with_references
from ft_assets.evaluation.report import compare_columns, score_columns, to_json
from ft_assets.evaluation.verdict import adjusted_p, quality
from ft_assets.job import Job, Report, StepResult
from ft_assets.models.loading import load_tokenizer
from ft_assets.release.card import model_card
from ft_assets.release.merge import merge
from ft_assets.release.verify import compare_models
from ft_assets.steps._run import main


def step(job: Job, report: Report) -> StepResult:
    settings, verdict = EvaluationSettings.model_validate(job.settings["evaluation"]), job.settings["verdict"]
    gate = GateSettings.model_validate(job.settings["gate"])
    snapshot, adapter = job.inputs["base_model"], job.inputs["adapter"]
    merged = merge(snapshot, adapter, job.output)
    report("merged", modules=merged["merged_modules"])
    heldout = with_references(load_tokenizer(snapshot), read_table(job.inputs["heldout_split"] / "heldout.parquet"))
    task = Task(heldout, [], [], [], None, settings, job.settings["schema"], Path(job.settings["root"]))
    base = _judged(job, "base", heldout)
    same, rows = compare_models(snapshot, adapter, job.output, task, base, _judged(job, verdict["candidate"], heldout))
    same |= _gain(rows, base, settings, gate)
    gain = {"mean": same["merged_gain"], "low": same["merged_gain_low"], "high": same["merged_gain_high"]}
    report("compared", **{name: value for name, value in same.items() if isinstance(value, float)})
    least = gate.min_top1_agreement
    if same["top1_agreement"] < least or not same["same_tokenizer_and_template"]:
        raise VerdictError(
            f"merged_model[{job.partition}]",
            f"the merged model is not what was proven: top-1 agreement {same['top1_agreement']:.4f}, same tokenizer and template: {same['same_tokenizer_and_template']}",
            f"top-1 agreement of at least {least} and the base's tokenizer",
            "nothing was published; report it",
        )
    if not same["merged_beats_base"] and not verdict.get("override"):
        raise VerdictError(
            f"merged_model[{job.partition}]",
            f"the adapter passed, the merged file does not: {settings.metric} {gain['mean']:+.3f} against base "
            f"[{gain['low']:+.3f}, {gain['high']:+.3f}], stop rate {same['merged_stop_rate']:.2f}",
            f"better than the base, stop rate of at least {gate.min_stop_rate}",
            "nothing was published; rounding to bf16 cost the gain: more held-out rows, or a stronger adapter",
        )
    text = (job.inputs["eval_report"] / "report.md").read_text()
    (job.output / "README.md").write_text(
        model_card(job.partition or "", job.settings["source"], verdict, text, same, job.settings["recipe"], job.settings["versions"])
    )
    (job.output / "verdict.json").write_text(to_json(verdict))
    return StepResult(
        {
            **merged,
            **{name: round(value, 6) if isinstance(value, float) else value for name, value in same.items()},
            "candidate": verdict["candidate"],
            "verdict": verdict["status"],
        }
    )


def _judged(job: Job, candidate: str, heldout: Rows) -> Rows:
    """Return the evaluation's scored rows of one candidate, in the order of the held-out rows."""
    table = pq.read_table(job.inputs["eval_report"] / "rows.parquet", filters=[("candidate", "=", candidate)])
    rows = {row["id"]: row for row in table.to_pylist()}
    return [rows[row["id"]] for row in heldout]


def _gain(rows: Rows, base: Rows, settings: EvaluationSettings, gate: GateSettings) -> dict[str, Any]:
    """Return the merged file's own scores against the base's, judged as the adapter was."""
    measured = {metric: values for metric, values in score_columns(rows).items() if metric in settings.metric_names()}
    against = compare_columns(measured, score_columns(base), gate.confidence, settings.seed)
    adjusted = adjusted_p({"merged": against}, settings.metric, gate)["merged"]
    fails, unsure, _ = quality(against, settings.metric, gate, adjusted)
    stop_rate, gain = statistics.fmean(float(row["stopped"]) for row in rows), against[settings.metric]
    return {
        f"merged_{settings.metric}": statistics.fmean(row[settings.metric] for row in rows),
        "merged_stop_rate": stop_rate,
        "merged_gain": gain["mean"],
        "merged_gain_low": gain["low"],
        "merged_gain_high": gain["high"],
        "merged_beats_base": not fails and not unsure and stop_rate >= gate.min_stop_rate,
    }


if __name__ == "__main__":
    main(step)
