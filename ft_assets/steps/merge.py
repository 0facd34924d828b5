"""Step: merge the proven adapter, prove from disk that the result is base + adapter, and score it.

After QLoRA there are two merges: onto the original weights, on which the evaluation judged the
adapter, and onto the NF4 round trip of the base, which the evaluation did not judge. Both are
proven and scored on the held-out rows. The better file is kept; on a tie the one on the original
weights, which does not have the error of NF4. A file that fails the gate is never kept.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import JsonValue

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.data.tables import read_table
from ft_assets.evaluation.references import with_references
from ft_assets.evaluation.report_model import EvalReport, Verdict
from ft_assets.evaluation.scored_rows import read_rivals, read_scored_rows
from ft_assets.evaluation.verdict.decision import to_beat
from ft_assets.evaluation.verdict.spending import gate_of
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.models.loading import load_tokenizer
from ft_assets.release.card_facts import CardFacts
from ft_assets.review.win_rates import FILE, read_people_scores
from ft_assets.rows.types import TokenizedRow
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.merging.file_verdict import Evaluated, FileVerdict
    from ft_assets.merging.merge import MergeBase, MergeResult
    from ft_assets.merging.verify import Proof

DIGITS = 6  # of the manifest's metrics


class Settings(StepSettings):
    """`method`: of the adapter's training. `gate`: the part of it that the file must pass."""

    STEP: ClassVar = Step("merge", gpu=True)

    method: str
    gate: GateSettings
    evaluation: EvaluationSettings
    answer_schema: dict[str, JsonValue] | None
    verdict: Verdict
    card: CardFacts
    root: Path


@dataclass(frozen=True)
class Merged:
    """One merged file: its folder, the size of the merge, and its proof."""

    folder: Path
    result: MergeResult
    proof: Proof


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    from ft_assets.merging.file_verdict import choose_file, judge_files

    where = f"merged_model[{job.partition}]"
    evaluated = _evaluated(job, settings)
    files = _merge_and_prove(job, settings, evaluated, report)
    verdicts = judge_files(
        evaluated,
        {name: file.proof.rows for name, file in files.items()},
        {name: file.folder for name, file in files.items()},
    )
    chosen = choose_file(verdicts, evaluated, where)
    _move_to_output(job, files[chosen].folder)
    return _write_documents(job, settings, evaluated, files[chosen], verdicts, chosen)


def _evaluated(job: Job, settings: Settings) -> Evaluated:
    """Read the evaluation that judged the adapter. The file is judged at the same confidence."""
    from ft_assets.evaluation.scorer import Task
    from ft_assets.merging.file_verdict import Evaluated

    split = job.inputs["heldout_split"]
    tokenizer = load_tokenizer(job.inputs["base_model"])
    evaluation = settings.evaluation
    heldout = read_table(split / "heldout.parquet", row=TokenizedRow)
    general = read_table(split / "retention.parquet", evaluation.retention_rows, row=TokenizedRow)
    task = Task(
        heldout=with_references(tokenizer, heldout),
        retention=with_references(tokenizer, general),
        settings=evaluation,
        schema=settings.answer_schema,
        root=settings.root,
        people=read_people_scores(job.inputs["eval_report"] / FILE),
    )
    table = job.inputs["eval_report"] / "rows.parquet"
    report = EvalReport.read(job.inputs["eval_report"] / "report.json")
    gate = gate_of(report, settings.gate)
    return Evaluated(
        folder=job.inputs["eval_report"],
        snapshot=job.inputs["base_model"],
        task=task,
        verdict=settings.verdict,
        gate=gate,
        base=read_scored_rows(table, "base", task.heldout),
        judged=read_scored_rows(table, settings.verdict.merged_candidate, task.heldout),
        rivals=read_rivals(job.inputs["eval_report"], report.rivals or {}, task.heldout),
        to_beat=to_beat(report, gate),
    )


def _merge_and_prove(
    job: Job, settings: Settings, evaluated: Evaluated, report: Report
) -> dict[MergeBase, Merged]:
    """Merge onto each base, and prove each result. Raises VerdictError if a proof fails."""
    from ft_assets.merging.file_verdict import require_same
    from ft_assets.merging.merge import merge
    from ft_assets.merging.verify import prove

    snapshot = evaluated.snapshot
    adapter = job.inputs["adapter"]
    rows = (evaluated.base, evaluated.judged)
    folders: dict[MergeBase, Path] = {"original": job.output}
    if settings.method == "qlora":
        folders["dequantized"] = job.work / "dequantized"
    job.work.mkdir(parents=True, exist_ok=True)
    files: dict[MergeBase, Merged] = {}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        result = merge(snapshot, adapter, folder, name)
        onto = {"base": name} if len(folders) > 1 else {}
        report("merged", modules=result.merged_modules, **onto)
        proof = prove(snapshot, adapter, folder, evaluated.task, *rows, job.work, name)
        require_same(proof, settings.gate, f"merged_model[{job.partition}]")
        numbers = proof.metrics().items()
        report("compared", **{key: value for key, value in numbers if isinstance(value, float)})
        files[name] = Merged(folder, result, proof)
    return files


def _move_to_output(job: Job, folder: Path) -> None:
    """Replace the output by the chosen file, and remove the other one."""
    if folder != job.output:
        for path in sorted(folder.iterdir()):
            (job.output / path.name).unlink(missing_ok=True)
            shutil.move(path, job.output / path.name)
    shutil.rmtree(job.work / "dequantized", ignore_errors=True)


def _write_documents(
    job: Job,
    settings: Settings,
    evaluated: Evaluated,
    file: Merged,
    verdicts: dict[MergeBase, FileVerdict],
    chosen: MergeBase,
) -> StepResult:
    """Write the model card and verdict.json; return the metrics of the manifest."""
    from ft_assets.merging.file_verdict import beyond_heldout
    from ft_assets.merging.other_parts import other_parts
    from ft_assets.release.card import MergedFile, model_card

    verdict = settings.verdict
    candidate = verdict.merged_candidate
    metric = evaluated.settings.metric
    report = EvalReport.read(evaluated.folder / "report.json")
    measures: dict[str, float | str] = {
        **file.proof.metrics(),
        **verdicts[chosen].gain.metrics(metric),
        f"adapter_{metric}": report.scores[candidate][metric],
        **_choice(verdicts, chosen, metric),
    }
    own = verdicts[chosen]
    if own.report is not None:
        measures |= beyond_heldout(own.report, candidate)
        report = own.report
        reasons = [f"this file: {reason}" for reason in own.reasons]
        verdict = verdict.model_copy(update={"reasons": [*verdict.reasons, *reasons]})
    card = model_card(settings.card, verdict, report, MergedFile.of(measures, metric))
    (job.output / "README.md").write_text(card, encoding="utf-8")
    (job.output / "verdict.json").write_text(verdict.to_json())
    rounded = {
        name: round(value, DIGITS) if isinstance(value, float) else value
        for name, value in measures.items()
    }
    metrics = {**asdict(file.result), **rounded}
    others = other_parts(evaluated.snapshot, job.output)
    if others.tensors:
        metrics |= {
            "other_tensors": others.tensors,
            "other_tensors_changed": ", ".join(others.changed),
        }
    return StepResult({**metrics, "candidate": candidate, "verdict": verdict.status})


def _choice(
    verdicts: dict[MergeBase, FileVerdict], chosen: MergeBase, metric: str
) -> dict[str, float | str]:
    """Return the metrics of the choice between two files; {} if there was one file."""
    if len(verdicts) < 2:
        return {}
    metrics: dict[str, float | str] = {"merge_base": chosen}
    for name, verdict in verdicts.items():
        metrics[f"merged_onto_{name}_{metric}"] = verdict.gain.score
    for name, verdict in verdicts.items():
        if verdict.problems:
            metrics[f"merged_onto_{name}_breaks_the_gate"] = "; ".join(verdict.problems)
    return metrics


if __name__ == "__main__":
    main(step)
