"""Step: merge the proven adapter, prove from disk that the result is base + adapter, and score the file itself.

After QLoRA both merges are made, proven and scored on the held-out rows: onto the original weights, on which the evaluation
judged the adapter, and onto what NF4 makes of them, which nobody has judged yet: before that one is kept the whole gate is
asked about it. The better is kept; of equals the original, which has not the damage of NF4 baked in; never one that breaks
the gate.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import PlainSerializer

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import VerdictError
from ft_assets.evaluation.references import with_references
from ft_assets.evaluation.report_model import EvalReport, Verdict
from ft_assets.evaluation.verdict.decision import PASS, adjusted_p, judge, quality
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.models.loading import load_tokenizer
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.evaluation.candidates import Rows, Task
    from ft_assets.merging.merge import MergeBase, MergeResult
    from ft_assets.merging.verify import Proof


class Settings(StepSettings):
    """`method`: how the adapter was trained. `gate`: the part of it that the file must pass."""

    STEP: ClassVar = Step("merge", gpu=True)

    method: str
    gate: GateSettings
    evaluation: EvaluationSettings
    answer_schema: dict[str, Any] | None
    verdict: Annotated[Verdict, PlainSerializer(Verdict.to_dict)]  # only the keys that are set
    card: dict[str, Any]
    root: Path


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.candidates import Task
    from ft_assets.evaluation.file_report import scored_rows
    from ft_assets.merging.merge import merge
    from ft_assets.merging.verify import prove
    from ft_assets.release.card import model_card

    settings, verdict, gate = given.evaluation, given.verdict, given.gate
    snapshot, evaluated, candidate = (
        job.inputs["base_model"],
        job.inputs["eval_report"],
        merged_candidate(verdict),
    )
    tokenizer, split = load_tokenizer(snapshot), job.inputs["heldout_split"]
    heldout = with_references(tokenizer, read_table(split / "heldout.parquet"))
    general = with_references(
        tokenizer, read_table(split / "retention.parquet", settings.retention_rows)
    )
    task = Task(heldout, general, [], [], None, settings, given.answer_schema, given.root)
    base, judged = (
        scored_rows(evaluated / "rows.parquet", name, heldout) for name in ("base", candidate)
    )
    bases: list[MergeBase] = (
        ["original", "dequantized"] if given.method == "qlora" else ["original"]
    )
    folders: dict[MergeBase, Path] = {
        name: job.output if name == "original" else job.work / name for name in bases
    }
    job.work.mkdir(parents=True, exist_ok=True)
    merged: dict[MergeBase, MergeResult] = {}
    proofs: dict[MergeBase, Proof] = {}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        merged[name] = merge(snapshot, job.inputs["adapter"], folder, name)
        report(
            "merged",
            modules=merged[name].merged_modules,
            **({"base": name} if len(bases) > 1 else {}),
        )
        proofs[name] = prove(
            snapshot, job.inputs["adapter"], folder, task, base, judged, job.work, name
        )
        require_same(proofs[name], gate, f"merged_model[{job.partition}]")
        report(
            "compared",
            **{
                key: value
                for key, value in proofs[name].metrics().items()
                if isinstance(value, float)
            },
        )
    scores: dict[MergeBase, float] = {
        name: statistics.fmean(row[settings.metric] for row in proof.rows)
        for name, proof in proofs.items()
    }
    standing = _standing(
        job,
        given,
        task,
        folders,
        {name: proof.rows for name, proof in proofs.items()},
        better_base(scores, settings),
    )
    if all(standing.broken.values()) and not verdict.override:
        raise VerdictError(
            where=f"merged_model[{job.partition}]",
            found=f"the adapter passed, the merged file does not: {_said(standing.broken)}",
            expected=f"better than the base, stop rate of at least {gate.min_stop_rate}"
            + (", and all else that the gate asks" if len(bases) > 1 else ""),
            fix="nothing was published; rounding to bf16 cost the gain: more held-out rows, or a stronger adapter"
            + (
                " (or lora: {method: lora}, which trains on the 16-bit weights)"
                if len(bases) > 1
                else ""
            ),
        )
    sound: dict[MergeBase, float] = {
        name: score for name, score in scores.items() if not standing.broken[name]
    }
    chosen = better_base(sound or scores, settings)
    if chosen != "original":
        for path in sorted(folders[chosen].iterdir()):
            (job.output / path.name).unlink(missing_ok=True)
            shutil.move(path, job.output / path.name)
    shutil.rmtree(job.work / "dequantized", ignore_errors=True)
    numbers = EvalReport.read(evaluated / "report.json")
    same = (
        proofs[chosen].metrics()
        | standing.gains[chosen]
        | {f"adapter_{settings.metric}": numbers.scores[candidate][settings.metric]}
    )
    if len(bases) > 1:
        same |= {
            "merge_base": chosen,
            **{f"merged_onto_{name}_{settings.metric}": score for name, score in scores.items()},
        }
        same |= {
            f"merged_onto_{name}_breaks_the_gate": "; ".join(reasons)
            for name, reasons in standing.broken.items()
            if reasons
        }
    if chosen == "dequantized" and standing.own is not None:
        same, numbers = same | _beyond_heldout(standing.own, candidate), standing.own
        of_file = [f"this file: {reason}" for reason in standing.reasons]
        verdict = verdict.model_copy(update={"reasons": [*verdict.reasons, *of_file]})
    (job.output / "README.md").write_text(
        model_card(given.card, verdict, numbers, same), encoding="utf-8"
    )
    (job.output / "verdict.json").write_text(verdict.to_json())
    return StepResult(
        {
            **asdict(merged[chosen]),
            **{
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in same.items()
            },
            "candidate": candidate,
            "verdict": verdict.status,
        }
    )


@dataclass(frozen=True)
class Standing:
    """What the merged files are worth by their own answers. gains: the scores; broken: why a file is not published, [] if it
    may be. own, reasons: the report about the dequantized merge and what the gate says of it, where that had to be asked."""

    gains: dict[MergeBase, dict[str, Any]]
    broken: dict[MergeBase, list[str]]
    own: EvalReport | None = None
    reasons: Sequence[str] = ()


def _standing(
    job: Job,
    given: Settings,
    task: Task,
    folders: dict[MergeBase, Path],
    rows: dict[MergeBase, Rows],
    better: MergeBase,
) -> Standing:
    """Judge the merged files. The one onto the original weights is what the evaluation judged, rounded: its held-out answers
    must keep the gain. The other is asked everything, if it is the better one or the first is refused."""
    from ft_assets.evaluation.file_report import report_of_file, scored_rows

    gate, settings = given.gate, task.settings
    verdict, evaluated = given.verdict, job.inputs["eval_report"]
    gains, adjusted = _gains(
        rows, scored_rows(evaluated / "rows.parquet", "base", task.heldout), settings, gate
    )
    broken: dict[MergeBase, list[str]] = {
        name: _broken(gain, settings.metric, gate) for name, gain in gains.items()
    }
    broken["original"] += [] if verdict.status == PASS else verdict.reasons
    if "dequantized" not in rows or (better == "original" and not broken["original"]):
        return Standing(gains, broken)
    candidate = merged_candidate(verdict)
    own = report_of_file(
        folders["dequantized"],
        job.inputs["base_model"],
        task,
        rows["dequantized"],
        evaluated,
        candidate,
        gate,
    )
    found = judge(candidate, own, gate, adjusted["dequantized"])
    broken["dequantized"] = [] if found.status == PASS else found.reasons
    return Standing(gains, broken, own, found.reasons)


def merged_candidate(verdict: Verdict) -> str:
    """Return the candidate that is merged; the gate lets no verdict without one through."""
    assert verdict.candidate is not None, "a verdict that passed the gate has a candidate"
    return verdict.candidate


def better_base(scores: dict[MergeBase, float], settings: EvaluationSettings) -> MergeBase:
    """Return the merge base whose merged model scores better by the gate's metric; of equals the original weights."""
    sign = -1 if settings.metric in settings.lower_is_better() else 1
    return max(scores, key=lambda name: (sign * scores[name], name == "original"))


def require_same(proof: Proof, gate: GateSettings, where: str) -> None:
    """Raise VerdictError unless the merged model is what was judged."""
    agreement, least = proof.metrics().get("top1_agreement"), gate.min_top1_agreement
    faults = proof.faults + (
        [f"top-1 agreement {agreement:.4f}"]
        if agreement is not None and not agreement >= least
        else []
    )
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise VerdictError(
            where=where,
            found=f"the merged model is not what was proven: {'; '.join(faults[:3])}{more}",
            expected=f"the base's tensors plus the adapter's update, the base's tokenizer and template, top-1 agreement of at least {least}",
            fix="nothing was published; report it",
        )


def _broken(gain: dict[str, Any], metric: str, gate: GateSettings) -> list[str]:
    """Return why a merged file is not better than the base by its own held-out answers; [] if it is."""
    if gain["merged_beats_base"]:
        return []
    low, high = gain["merged_gain_low"], gain["merged_gain_high"]
    return [
        f"{metric} {gain['merged_gain']:+.3f} against base [{low:+.3f}, {high:+.3f}], stop rate {gain['merged_stop_rate']:.2f}"
    ]


def _said(broken: dict[MergeBase, list[str]]) -> str:
    if len(broken) == 1:
        return "; ".join(broken["original"])
    onto = {"original": "onto the original weights", "dequantized": "onto what NF4 makes of them"}
    return "; ".join(f"{onto[name]}: {', '.join(reasons)}" for name, reasons in broken.items())


def _beyond_heldout(own: EvalReport, candidate: str) -> dict[str, float]:
    """Return what a file that the evaluation did not judge does besides answering better: habits, forgetting, the prompted base."""
    said = {f"merged_{name}": own.scores[candidate][name] for name in ("refused", "repetition")}
    if own.retention is not None:
        general, task = own.retention.comparisons[candidate]["base"], own.retention.metric
        said |= {
            "merged_retention_loss_rise": -general["loss"].mean,
            f"merged_retention_{task}_change": general[task].mean,
        }
    if "few_shot" in own.comparisons[candidate]:
        prompted = own.comparisons[candidate]["few_shot"]
        said["merged_against_few_shot"] = prompted[own.metric].mean
    return said


def _gains(
    merged: dict[MergeBase, Rows], base: Rows, settings: EvaluationSettings, gate: GateSettings
) -> tuple[dict[MergeBase, dict[str, Any]], dict[str, dict[str, float]]]:
    """Return (the merged files' own scores against the base's, judged as the adapter was; the p-values: two merges are two chances, Holm)."""
    from ft_assets.evaluation.report import compare_columns, score_columns

    judged = {
        name: {
            metric: values
            for metric, values in score_columns(rows).items()
            if metric in settings.metric_names()
        }
        for name, rows in merged.items()
    }
    against = {
        name: compare_columns(columns, score_columns(base), settings, gate)
        for name, columns in judged.items()
    }
    adjusted = adjusted_p(against, settings.metric, gate)
    gains: dict[MergeBase, dict[str, Any]] = {}
    for name, rows in merged.items():
        found = quality(against[name], settings.metric, gate, adjusted[name])
        stop_rate, gain = (
            statistics.fmean(float(row["stopped"]) for row in rows),
            against[name][settings.metric],
        )
        gains[name] = {
            f"merged_{settings.metric}": statistics.fmean(row[settings.metric] for row in rows),
            "merged_stop_rate": stop_rate,
            "merged_gain": gain.mean,
            "merged_gain_low": gain.low,
            "merged_gain_high": gain.high,
            "merged_beats_base": found.passed and stop_rate >= gate.min_stop_rate,
        }
    return gains, adjusted


if __name__ == "__main__":
    main(step)
