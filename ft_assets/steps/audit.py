"""Step: find the training rows that are probably wrong, by trainings that did not see them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ft_assets.config import AuditSettings, LoraSettings, SftSettings
from ft_assets.data.mixing import is_copy
from ft_assets.data.tables import AUDIT, Table, read_table, write_table
from ft_assets.errors import DataError
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import ConversationRow, CopyRow, MemberRow, TokenizedRow
from ft_assets.step_runner import main, takes

TABLES = {  # whose rows are trained: {asset: its tables}
    "raw_dataset": ("conversations", "rehearsal"),
    "own_rehearsal": ("rehearsal",),
}
TABLE = "rows.parquet"  # the named rows


class Settings(StepSettings):
    STEP: ClassVar = Step("audit", gpu=True)

    lora: LoraSettings
    sft: SftSettings
    audit: AuditSettings
    memory_limit_gb: float | None = None


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.row_audit import FoldScores, audit, fold_of, score_rows
    from ft_assets.models.loading import load_tokenizer
    from ft_assets.training.subsets import SubsetTrainings

    split, snapshot = job.inputs["heldout_split"], job.inputs["base_model"]
    tokenizer = load_tokenizer(snapshot)
    every = read_table(split / "train.parquet", row=TokenizedRow)
    every = [row for row in every if not is_copy(row["id"])]  # of a weight above 1
    task = _ids(job.inputs["raw_dataset"] / "conversations.parquet")
    rows = [row for row in every if row["id"].partition(".")[0] in task]
    others = [row for row in every if row["id"].partition(".")[0] not in task]
    folds = [
        [fold_of(row, given.audit) == fold for row in rows] for fold in range(given.audit.folds)
    ]
    require_rows([sum(own) for own in folds], len(rows))  # before the first hour of training
    trainings = SubsetTrainings(
        snapshot=snapshot,
        lora=given.lora,
        sft=short(given.sft, given.audit),
        folder=job.checkpoints,
        report=report,
        memory_limit_gb=given.memory_limit_gb,
        before=job.inputs.get("text_adapter"),
    )
    scores = {}
    for fold, own in enumerate(folds):
        inside = [row for row, is_in in zip(rows, own, strict=True) if is_in]
        outside = [row for row, is_in in zip(rows, own, strict=True) if not is_in]
        found = trainings.measure(
            f"fold-{fold}",
            [*outside, *others],
            lambda adapter, rows=inside: score_rows(snapshot, adapter, tokenizer, rows),
            FoldScores,
            seed=given.audit.seed + fold,
        )
        scores.update({line.id: line for line in found.rows})
    near = Table[CopyRow](split / "info" / "near_duplicates.parquet")
    within = (row for row in near if row["kind"] == "within" and row["side"] == "train")
    sources = sources_of(job.inputs)
    done = audit(rows, others, scores, within, sources, tokenizer, given.audit)
    write_table(job.output / TABLE, done.named, AUDIT)
    counts = Counter(row["reason"].replace(" ", "_") for row in done.named)
    return StepResult(
        {
            "rows": len(rows),
            "named": len({row["id"] for row in done.named}),
            **counts,
            "wrong_share": round(done.found.share, 4) if counts["wrong_answer"] else 0.0,
            "evidence": float(f"{done.found.evidence:.3g}"),
            "informed": done.found.informed,
            "temperature": done.found.temperature,
            "mean_loss": round(sum(done.losses) / len(done.losses), 4),
        }
    )


def short(sft: SftSettings, audit: AuditSettings) -> SftSettings:
    """Return SFT's settings with the audit's epochs, without what needs validation rows."""
    changes = {"num_train_epochs": audit.num_train_epochs, "max_steps": -1}
    return sft.model_copy(update={**changes, "early_stopping": None, "keep": "last"})


def _ids(path: Path) -> set[str]:
    return {row["id"] for row in Table[MemberRow](path, ["id"])}


def sources_of(inputs: Mapping[str, Path]) -> dict[str, str]:
    """Return {id: file and line} of the rows of the data files, or of their prompts' files."""
    return {
        row["id"]: row["source"]
        for asset, names in TABLES.items()
        if asset in inputs
        for name in names
        for row in Table[ConversationRow](inputs[asset] / f"{name}.parquet", ["id", "source"])
    }


def require_rows(folds: Sequence[int], rows: int) -> None:
    """Raise DataError if a fold of these numbers of rows is empty, or is all rows."""
    for number, inside in enumerate(folds, start=1):
        if not 0 < inside < rows:
            raise DataError(
                where="audit.folds",
                found=f"fold {number} of {len(folds)} has {inside} rows, the others "
                f"{rows - inside}; rows of one group are in one fold",
                expected="rows in each fold",
                fix="lower audit.folds, or add rows to data.train",
            )


if __name__ == "__main__":
    main(step)
