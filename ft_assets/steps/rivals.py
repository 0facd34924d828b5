"""Step: ask the rivals for the held-out rows. For endpoints alone it loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from ft_assets.artifacts.environment import library_versions
from ft_assets.config import EvaluationSettings
from ft_assets.data.tables import read_table
from ft_assets.evaluation.retrieval import DocumentFile
from ft_assets.evaluation.rival_answers import LocalBase
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import TokenizedRow
from ft_assets.step_runner import main, takes
from ft_assets.steps.answers import weights_key


class Settings(StepSettings):
    """`earlier`: the tables of all current rival answers, whose answers are not asked again.

    `bases`: the base models that answer, with the version of their weights. `documents`: the files
    that each rival searches.
    """

    STEP: ClassVar = Step("rivals")

    evaluation: EvaluationSettings
    earlier: tuple[Path, ...] = ()
    bases: tuple[LocalBase, ...] = ()
    documents: dict[str, tuple[DocumentFile, ...]] = Field(default={})


class OnGpu(Settings):
    """The settings where a base model answers."""

    STEP: ClassVar = Step("rivals", gpu=True)


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.rival_answers import (
        COSTS,
        TABLE,
        Tried,
        costs_json,
        read_answers,
        write_answers,
    )
    from ft_assets.evaluation.rivals import Sources, ask_rivals, write_searches

    heldout = read_table(job.inputs["heldout_split"] / "heldout.parquet", row=TokenizedRow)
    tried = Tried(job.checkpoints / "answers.jsonl")
    known = [answer for table in given.earlier if table.exists() for answer in read_answers(table)]
    kept = {answer.key: answer for answer in [*known, *tried.read()]}
    libraries = library_versions("infer") if given.bases else {}
    bases = {
        one.name: one.model_copy(update={"version": weights_key(one.version, libraries)})
        for one in given.bases
    }
    sources = Sources(own=job.partition or "", bases=bases, documents=given.documents)
    found = ask_rivals(heldout, given.evaluation, sources, kept, tried, report)
    write_answers(job.output / TABLE, found.answers)
    (job.output / COSTS).write_text(costs_json(found.costs))
    write_searches(job.output, heldout, found)
    reported = {answer.model for answer in found.answers if answer.model}
    return StepResult(
        {
            "rivals": ", ".join(given.evaluation.rivals),
            "heldout_rows": len(heldout),
            "models": ", ".join(sorted(reported)),
            **{
                f"{name}_per_thousand": round(cost.per_thousand, 4)
                for name, cost in found.costs.items()
                if cost.per_thousand is not None
            },
            **{
                f"{name}_{count}": number
                for name, retrieved in found.retrieved.items()
                for count, number in retrieved.numbers().items()
                if count != "rows"
            },
        }
    )


if __name__ == "__main__":
    main(step)
