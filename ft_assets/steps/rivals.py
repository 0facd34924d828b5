"""Step: ask the rivals behind endpoints for the held-out rows. It loads no model and no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ft_assets.config import EvaluationSettings
from ft_assets.data.tables import read_table
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import TokenizedRow
from ft_assets.step_runner import main, takes


class Settings(StepSettings):
    """`earlier`: the tables of all current rival answers, whose answers are not asked again."""

    STEP: ClassVar = Step("rivals")

    evaluation: EvaluationSettings
    earlier: tuple[Path, ...] = ()


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.rivals import (
        COSTS,
        TABLE,
        Tried,
        ask_rivals,
        cost_of,
        costs_json,
        read_answers,
        write_answers,
    )

    heldout = read_table(job.inputs["heldout_split"] / "heldout.parquet", row=TokenizedRow)
    tried = Tried(job.checkpoints / "answers.jsonl")
    known = [answer for table in given.earlier if table.exists() for answer in read_answers(table)]
    kept = {answer.key: answer for answer in [*known, *tried.read()]}
    answers = ask_rivals(heldout, given.evaluation, kept, tried, report)
    costs = {
        name: cost_of([answer for answer in answers if answer.rival == name], settings)
        for name, settings in given.evaluation.rivals.items()
    }
    write_answers(job.output / TABLE, answers)
    (job.output / COSTS).write_text(costs_json(costs))
    reported = {answer.model for answer in answers if answer.model}
    return StepResult(
        {
            "rivals": ", ".join(given.evaluation.rivals),
            "heldout_rows": len(heldout),
            "models": ", ".join(sorted(reported)),
            **{
                f"{name}_per_thousand": round(cost.per_thousand, 4)
                for name, cost in costs.items()
                if cost.per_thousand is not None
            },
        }
    )


if __name__ == "__main__":
    main(step)
