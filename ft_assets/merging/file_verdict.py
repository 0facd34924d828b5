"""Judge merged files by their own answers, and choose the one to publish.

The file merged onto the original weights is the adapter that the evaluation judged, rounded: its
held-out answers must keep the gain. The file merged onto the NF4 round trip of the base is a
different model, which the evaluation did not judge: it must pass the whole gate.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.errors import VerdictError
from ft_assets.evaluation.file_report import report_of_file
from ft_assets.evaluation.report import compare_rows
from ft_assets.evaluation.report_model import Difference, EvalReport, Verdict
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.evaluation.scorer import Task
from ft_assets.evaluation.verdict.decision import (
    PASS,
    adjusted_p,
    against_rivals,
    judge,
    quality,
)
from ft_assets.merging.agreement import LogitAgreement
from ft_assets.merging.merge import MergeBase
from ft_assets.merging.verify import Proof

MAX_FAULTS = 3  # in an error message
LOST_UPDATE = 0.5  # of a module's update: more than this explains other answers
ONTO = {
    "original": "onto the original weights",
    "dequantized": "onto the NF4 round trip of the base",
}


@dataclass(frozen=True)
class FileGain:
    """A file's score and stop rate on the held-out rows, and its difference from the base.

    rivals: its differences from them. not_beaten: why it is not better than one that it must beat.
    """

    score: float
    stop_rate: float
    difference: Difference
    beats_base: bool
    rivals: dict[str, Difference] = field(default_factory=dict)
    not_beaten: list[str] = field(default_factory=list)

    def metrics(self, metric: str) -> dict[str, float]:
        """Return the numbers under their keys in the manifest."""
        return {
            f"merged_{metric}": self.score,
            "merged_stop_rate": self.stop_rate,
            "merged_gain": self.difference.mean,
            "merged_gain_low": self.difference.low,
            "merged_gain_high": self.difference.high,
            "merged_beats_base": self.beats_base,
            **{f"merged_against_{name}": entry.mean for name, entry in self.rivals.items()},
        }

    def problems(self, metric: str) -> list[str]:
        """Return the reasons why the file is not better than base and rivals; [] if it is."""
        if self.beats_base:
            return self.not_beaten
        gain = self.difference
        interval = f"[{gain.low:+.3f}, {gain.high:+.3f}]"
        stops = f"stop rate {self.stop_rate:.2f}"
        return [f"{metric} {gain.mean:+.3f} against base {interval}, {stops}", *self.not_beaten]


@dataclass(frozen=True)
class FileVerdict:
    """The gain of one file, and its problems with the gate: [] if it may be published.

    report, reasons: of this file's own evaluation, if it was evaluated in full.
    """

    gain: FileGain
    problems: list[str]
    report: EvalReport | None = None
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluated:
    """The evaluation that judged the adapter: its report's folder, its task, verdict and gate.

    base, judged: its scored held-out rows of the base and of the adapter. rivals: those of the
    rivals; to_beat: the rivals that a PASS must be better than.
    """

    folder: Path
    snapshot: Path
    task: Task
    verdict: Verdict
    gate: GateSettings
    base: list[ScoredRow]
    judged: list[ScoredRow]
    rivals: dict[str, list[ScoredRow]] = field(default_factory=dict)
    to_beat: list[str] = field(default_factory=list)

    @property
    def settings(self) -> EvaluationSettings:
        """The settings of the evaluation."""
        return self.task.settings


def require_same(proof: Proof, gate: GateSettings, where: str) -> None:
    """Raise VerdictError unless the merged model is the judged one.

    The weights and the tokenizer must be proven. The agreement of the answers must not be proven to
    be below `gate.min_top1_agreement`: where the compared tokens cannot tell, the file's own score
    on the held-out rows decides (judge_files).
    """
    faults = proof.faults
    if faults:
        hidden = len(faults) - MAX_FAULTS
        named = "; ".join(faults[:MAX_FAULTS]) + (f" (and {hidden} more)" if hidden > 0 else "")
        raise VerdictError(
            where=where,
            found=f"the merged model is not what was proven: {named}",
            expected="the base's tensors plus the adapter's update, the base's tokenizer and "
            "template",
            fix="nothing was published; this is a bug in ft_assets: please report it",
        )
    least = gate.min_top1_agreement
    # Not high < least: that is False for NaN.
    if proof.answers is not None and not proof.answers.logits.top1_high >= least:
        raise _other_answers(proof.answers.logits, proof.weights.update_error, least, where)


def _other_answers(
    found: LogitAgreement, update_error: float, least: float, where: str
) -> VerdictError:
    """Return the error of a file whose tensors are right and whose answers are others."""
    if update_error > LOST_UPDATE:
        fix = (
            f"nothing was published: rounding to the file's format loses up to {update_error:.0%} "
            "of a module's update; train a stronger adapter (more steps, a higher learning rate), "
            "or lower gate.min_top1_agreement: the file's own score on the held-out rows is "
            "judged in any case"
        )
    else:
        fix = (
            "nothing was published; the files are right, and rounding does not explain other "
            "answers: please report it with the versions of transformers and peft"
        )
    return VerdictError(
        where=where,
        found="every tensor is base + update, but the merged model is not what was proven: top-1 "
        f"agreement {found.top1_agreement:.4f} [{found.top1_low:.4f}, {found.top1_high:.4f}] on "
        f"{found.compared_tokens} tokens",
        expected=f"an agreement that may be {least}, as gate.min_top1_agreement requires",
        fix=fix,
    )


def better_base(scores: Mapping[MergeBase, float], settings: EvaluationSettings) -> MergeBase:
    """Return the merge base with the better score; on a tie the original weights."""
    sign = -1 if settings.metric in settings.lower_is_better() else 1
    return max(scores, key=lambda name: (sign * scores[name], name == "original"))


def judge_files(
    evaluated: Evaluated,
    rows: Mapping[MergeBase, list[ScoredRow]],
    folders: Mapping[MergeBase, Path],
) -> dict[MergeBase, FileVerdict]:
    """Judge each merged file by its scored held-out rows.

    The file on the NF4 round trip is evaluated in full only if it is the better one, or if the
    other one has problems.
    """
    metric = evaluated.settings.metric
    gains, adjusted = file_gains(evaluated, rows)
    verdicts: dict[MergeBase, FileVerdict] = {
        name: FileVerdict(gain, gain.problems(metric)) for name, gain in gains.items()
    }
    if evaluated.verdict.status != PASS:  # the gate is overridden
        original = verdicts["original"]
        problems = [*original.problems, *evaluated.verdict.reasons]
        verdicts["original"] = FileVerdict(original.gain, problems)
    scores: dict[MergeBase, float] = {name: gain.score for name, gain in gains.items()}
    original_wins = better_base(scores, evaluated.settings) == "original"
    if "dequantized" not in rows or (original_wins and not verdicts["original"].problems):
        return verdicts
    candidate = evaluated.verdict.merged_candidate
    report = report_of_file(
        folders["dequantized"],
        evaluated.snapshot,
        evaluated.task,
        rows["dequantized"],
        evaluated.folder,
        candidate,
        evaluated.gate,
    )
    found = judge(candidate, report, evaluated.gate, adjusted["dequantized"])
    problems = [] if found.status == PASS else found.reasons
    verdicts["dequantized"] = FileVerdict(gains["dequantized"], problems, report, found.reasons)
    return verdicts


def file_gains(
    evaluated: Evaluated, rows: Mapping[MergeBase, list[ScoredRow]]
) -> tuple[dict[MergeBase, FileGain], dict[str, dict[str, float]]]:
    """Compare each file's held-out answers with the base's, by the rules of the adapter's verdict.

    Returns the gains and Holm's p-values {file: {metric: p}}: two files are two chances.
    """
    gate = evaluated.gate
    settings = evaluated.settings
    metric = settings.metric
    names = settings.metric_names()
    against = {
        name: compare_rows(scored, evaluated.base, settings, gate.confidence, names)
        for name, scored in rows.items()
    }
    adjusted = adjusted_p(against, metric, gate)
    gains: dict[MergeBase, FileGain] = {}
    for name, scored in rows.items():
        stop_rate = statistics.fmean(float(row.stopped) for row in scored)
        passed = quality(against[name], metric, gate, adjusted[name]).passed
        others = {
            rival: compare_rows(scored, its, settings, gate.confidence, {metric})[metric]
            for rival, its in evaluated.rivals.items()
        }
        wanted = {rival: others.get(rival) for rival in evaluated.to_beat}
        judged = against_rivals(wanted, metric, gate.confidence)
        gains[name] = FileGain(
            score=statistics.fmean(row.scores[metric] for row in scored if metric in row.scores),
            stop_rate=stop_rate,
            difference=against[name][metric],
            beats_base=passed and stop_rate >= gate.min_stop_rate,
            rivals=others,
            not_beaten=[*judged.fails, *judged.unsure],
        )
    return gains, adjusted


def choose_file(
    verdicts: Mapping[MergeBase, FileVerdict], evaluated: Evaluated, where: str
) -> MergeBase:
    """Return the better file among those without problems.

    Raises VerdictError if all have problems, unless the gate is overridden: then the better of all.
    """
    sound: dict[MergeBase, float] = {
        name: verdict.gain.score for name, verdict in verdicts.items() if not verdict.problems
    }
    if sound or evaluated.verdict.override:
        scores: dict[MergeBase, float] = {
            name: verdict.gain.score for name, verdict in verdicts.items()
        }
        return better_base(sound or scores, evaluated.settings)
    several = len(verdicts) > 1
    lines = [
        f"{ONTO[name]}: {', '.join(verdict.problems)}" if several else "; ".join(verdict.problems)
        for name, verdict in verdicts.items()
    ]
    rest = ", and a pass of the whole gate" if several else ""
    lora = " (or lora: {method: lora}, which trains on the 16-bit weights)" if several else ""
    raise VerdictError(
        where=where,
        found=f"the adapter passed, the merged file does not: {'; '.join(lines)}",
        expected="a file that is better than the base, with a stop rate of at least "
        f"{evaluated.gate.min_stop_rate}{rest}",
        fix="nothing was published: rounding to bf16 cost the gain; use more held-out rows, or a "
        f"stronger adapter{lora}",
    )


def beyond_heldout(report: EvalReport, candidate: str) -> dict[str, float]:
    """Return the metrics of a file's own evaluation besides its gain over the base.

    These are its refusals and repetition, forgetting, and the comparison with the prompted base.
    """
    scores = report.scores[candidate]
    metrics = {f"merged_{name}": scores[name] for name in ("refused", "repetition")}
    if report.retention is not None:
        general = report.retention.comparisons[candidate]["base"]
        task = report.retention.metric
        metrics["merged_retention_loss_rise"] = -general["loss"].mean
        metrics[f"merged_retention_{task}_change"] = general[task].mean
    if prompted := report.comparisons[candidate].get("few_shot"):
        metrics["merged_against_few_shot"] = prompted[report.metric].mean
    return metrics
