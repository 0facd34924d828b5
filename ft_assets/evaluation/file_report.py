"""The report once more, with a merged file in its adapter's place: for a file that the evaluation did not judge.

The evaluation judges an adapter on the base's 16-bit weights. Merged onto what NF4 makes of them it answers otherwise, also on
general prompts, and what that file forgot nobody has asked yet.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from ft_assets.config import GateSettings
from ft_assets.evaluation.candidates import Rows, Scored, Scorer, Task
from ft_assets.evaluation.harness import harness_scores
from ft_assets.evaluation.report import summarise
from ft_assets.evaluation.report_model import EvalReport
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids

OF_THE_ROW = (
    "candidate",
    "id",
    "prompt",
    "reference",
)  # what a row of the report's tables holds besides the scores


def scored_rows(table: Path, candidate: str, asked: Rows) -> Rows:
    """Return one candidate's scored rows out of rows.parquet or retention.parquet of a report, in the order of `asked`."""
    found = {
        row["id"]: row
        for row in pq.read_table(table, filters=[("candidate", "=", candidate)]).to_pylist()
    }
    # What a row was not asked (a general prompt beyond retention_answers) is null in the table.
    return [
        {
            key: value
            for key, value in found[row["id"]].items()
            if key not in OF_THE_ROW and value is not None
        }
        for row in asked
    ]


def report_of_file(
    file: Path,
    snapshot: Path,
    task: Task,
    rows: Rows,
    report: Path,
    candidate: str,
    gate: GateSettings,
) -> EvalReport:
    """Return the numbers of `report` (a folder), those of `candidate` replaced by the merged file's own.

    rows: the file's scored held-out rows. Asked here are its general prompts and, if there are any, the tasks of
    lm-evaluation-harness: those of the base too, whose single documents no report keeps.
    """
    before = EvalReport.read(report / "report.json")
    general = list(before.retention.scores) if before.retention else []
    model = load_base(file)
    scorer = Scorer(model, load_tokenizer(file), stop_ids(file), task)
    own = {"heldout": rows, "retention": scorer.retention(task.retention) if general else []}
    chance = {candidate: scorer.chance(rows)}
    harness = (
        {candidate: harness_scores(model, scorer.tokenizer, task.settings, task.root)}
        if task.settings.lm_eval
        else {}
    )
    del model, scorer  # one model in memory at a time
    if harness:
        harness = {
            "base": harness_scores(
                load_base(snapshot), load_tokenizer(snapshot), task.settings, task.root
            ),
            **harness,
        }

    def columns(side: str, table: str, names: Sequence[str], asked: Rows) -> dict[str, Rows]:
        return {
            name: own[side] if name == candidate else scored_rows(report / table, name, asked)
            for name in names
        }

    scored = Scored(
        heldout=columns("heldout", "rows.parquet", list(before.scores), task.heldout),
        retention=columns("retention", "retention.parquet", general, task.retention),
        chance=chance,
        harness=harness,
        proofs=before.proofs,
    )
    numbers = summarise(scored, task.settings, gate, before.bound_to, before.evidence)
    return numbers.model_copy(update={"chance": {**before.chance, **numbers.chance}})
