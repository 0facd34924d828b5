"""Step: merge the proven adapter, prove from disk that the result is base + adapter, and score the file itself.

After QLoRA both merges are made, proven and scored on the held-out rows: onto the original weights and onto what NF4 makes
of them. The better is kept; of equals the original, which has not the damage of NF4 baked in.
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.config.evaluation import LOWER_IS_BETTER
from ft_assets.data.tables import read_table
from ft_assets.errors import VerdictError
from ft_assets.evaluation.candidates import Rows, Task
from ft_assets.evaluation.references import with_references
from ft_assets.evaluation.report import compare_columns, score_columns, to_json
from ft_assets.evaluation.verdict import adjusted_p, quality
from ft_assets.job import Job, Report, StepResult
from ft_assets.models.loading import load_tokenizer
from ft_assets.release.card import model_card
from ft_assets.release.merge import MergeBase, merge
from ft_assets.release.verify import Proof, prove
from ft_assets.steps._run import main


def step(job: Job, report: Report) -> StepResult:
    settings, verdict = EvaluationSettings.model_validate(job.settings["evaluation"]), job.settings["verdict"]
    gate = GateSettings.model_validate(job.settings["gate"])
    snapshot = job.inputs["base_model"]
    heldout = with_references(load_tokenizer(snapshot), read_table(job.inputs["heldout_split"] / "heldout.parquet"))
    task = Task(heldout, [], [], [], None, settings, job.settings["schema"], Path(job.settings["root"]))
    base = _judged(job, "base", heldout)
    bases: list[MergeBase] = ["original", "dequantized"] if job.settings["method"] == "qlora" else ["original"]
    folders: dict[MergeBase, Path] = {name: job.output if name == "original" else job.work / name for name in bases}
    job.work.mkdir(parents=True, exist_ok=True)
    merged: dict[MergeBase, dict[str, Any]] = {}
    proofs: dict[MergeBase, Proof] = {}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        merged[name] = merge(snapshot, job.inputs["adapter"], folder, name)
        report("merged", modules=merged[name]["merged_modules"], **({"base": name} if len(bases) > 1 else {}))
        proofs[name] = prove(
            snapshot, job.inputs["adapter"], folder, task, base, _judged(job, verdict["candidate"], heldout), job.work, name
        )
        require_same(proofs[name], gate, f"merged_model[{job.partition}]")
        report("compared", **{key: value for key, value in proofs[name].numbers.items() if isinstance(value, float)})
    scores: dict[MergeBase, float] = {name: statistics.fmean(row[settings.metric] for row in proof.rows) for name, proof in proofs.items()}
    chosen = better_base(scores, settings.metric)
    if chosen != "original":
        for path in sorted(folders[chosen].iterdir()):
            (job.output / path.name).unlink(missing_ok=True)
            shutil.move(path, job.output / path.name)
    shutil.rmtree(job.work / "dequantized", ignore_errors=True)
    same = proofs[chosen].numbers | _gains({name: proof.rows for name, proof in proofs.items()}, base, settings, gate)[chosen]
    if len(bases) > 1:
        same |= {"merge_base": chosen, **{f"merged_onto_{name}_{settings.metric}": score for name, score in scores.items()}}
    gain = {"mean": same["merged_gain"], "low": same["merged_gain_low"], "high": same["merged_gain_high"]}
    if not same["merged_beats_base"] and not verdict.get("override"):
        raise VerdictError(
            f"merged_model[{job.partition}]",
            f"the adapter passed, the merged file does not: {settings.metric} {gain['mean']:+.3f} against base "
            f"[{gain['low']:+.3f}, {gain['high']:+.3f}], stop rate {same['merged_stop_rate']:.2f}",
            f"better than the base, stop rate of at least {gate.min_stop_rate}",
            "nothing was published; rounding to bf16 cost the gain: more held-out rows, or a stronger adapter",
        )
    numbers = json.loads((job.inputs["eval_report"] / "report.json").read_text())
    (job.output / "README.md").write_text(model_card(job.settings["card"], verdict, numbers, same), encoding="utf-8")
    (job.output / "verdict.json").write_text(to_json(verdict))
    return StepResult(
        {
            **merged[chosen],
            **{name: round(value, 6) if isinstance(value, float) else value for name, value in same.items()},
            "candidate": verdict["candidate"],
            "verdict": verdict["status"],
        }
    )


def better_base(scores: dict[MergeBase, float], metric: str) -> MergeBase:
    """Return the merge base whose merged model scores better by the gate's metric; of equals the original weights."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(scores, key=lambda name: (sign * scores[name], name == "original"))


def require_same(proof: Proof, gate: GateSettings, where: str) -> None:
    """Raise VerdictError unless the merged model is what was judged."""
    agreement, least = proof.numbers.get("top1_agreement"), gate.min_top1_agreement
    faults = proof.faults + ([f"top-1 agreement {agreement:.4f}"] if agreement is not None and not agreement >= least else [])
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise VerdictError(
            where,
            f"the merged model is not what was proven: {'; '.join(faults[:3])}{more}",
            f"the base's tensors plus the adapter's update, the base's tokenizer and template, top-1 agreement of at least {least}",
            "nothing was published; report it",
        )


def _judged(job: Job, candidate: str, heldout: Rows) -> Rows:
    """Return the evaluation's scored rows of one candidate, in the order of the held-out rows."""
    table = pq.read_table(job.inputs["eval_report"] / "rows.parquet", filters=[("candidate", "=", candidate)])
    rows = {row["id"]: row for row in table.to_pylist()}
    return [rows[row["id"]] for row in heldout]


def _gains(merged: dict[MergeBase, Rows], base: Rows, settings: EvaluationSettings, gate: GateSettings) -> dict[MergeBase, dict[str, Any]]:
    """Return the merged files' own scores against the base's, judged as the adapter was; two merges are two chances (Holm)."""
    judged = {
        name: {metric: values for metric, values in score_columns(rows).items() if metric in settings.metric_names()}
        for name, rows in merged.items()
    }
    against = {name: compare_columns(columns, score_columns(base), gate.confidence, settings.seed) for name, columns in judged.items()}
    adjusted = adjusted_p(against, settings.metric, gate)
    gains: dict[MergeBase, dict[str, Any]] = {}
    for name, rows in merged.items():
        fails, unsure, _ = quality(against[name], settings.metric, gate, adjusted[name])
        stop_rate, gain = statistics.fmean(float(row["stopped"]) for row in rows), against[name][settings.metric]
        gains[name] = {
            f"merged_{settings.metric}": statistics.fmean(row[settings.metric] for row in rows),
            "merged_stop_rate": stop_rate,
            "merged_gain": gain["mean"],
            "merged_gain_low": gain["low"],
            "merged_gain_high": gain["high"],
            "merged_beats_base": not fails and not unsure and stop_rate >= gate.min_stop_rate,
        }
    return gains


if __name__ == "__main__":
    main(step)
