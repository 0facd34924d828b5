"""Step: ask the base for a sample of training rows, with and without help, and walk the tree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, JsonValue

from ft_assets.artifacts.environment import library_versions
from ft_assets.config import AdviseSettings, EvaluationSettings
from ft_assets.data.tables import read_table
from ft_assets.evaluation.advice import ADVICE, advise, text_of
from ft_assets.evaluation.retrieval import DocumentFile
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import ConversationRow
from ft_assets.step_runner import main, takes
from ft_assets.steps.answers import weights_key

if TYPE_CHECKING:
    from ft_assets.evaluation.advice_sample import Sample

TEXT, ROWS = "advice.md", "rows.parquet"


class Settings(StepSettings):
    """`base_version`: of the weights, as for the answers. `answers`: their last folder.

    `documents`: the files that each rival searches which the base itself answers for.
    """

    STEP: ClassVar = Step("advise", gpu=True)

    advise: AdviseSettings
    evaluation: EvaluationSettings
    few_shot_system: str | None = None
    answer_schema: dict[str, JsonValue] | None = None
    documents: dict[str, tuple[DocumentFile, ...]] = Field(default={})
    not_asked: dict[str, str] = Field(default={})
    heldout_groups: int
    min_heldout: int
    pairs: int = 0
    base_version: str
    answers: Path | None = None
    root: Path


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.advice_sample import measure
    from ft_assets.evaluation.scored_rows import write_scored_rows

    found = measure(_sample(job, given), report)
    advice = advise(found.evidence)
    (job.output / ADVICE).write_text(advice.to_json())
    (job.output / TEXT).write_text(text_of(advice))
    write_scored_rows(job.output / ROWS, found.scored, found.rows)
    metric = found.evidence.metric
    scores = {f"{way}_{metric}": round(one.mean, 4) for way, one in found.evidence.scores.items()}
    return StepResult(
        {"outcome": advice.outcome, "sampled": found.evidence.sampled, **scores, **found.cost}
    )


def _sample(job: Job, given: Settings) -> Sample:
    from ft_assets.evaluation.advice_sample import Sample
    from ft_assets.evaluation.own_prompts import own_rows

    examples = read_table(job.inputs["raw_dataset"] / "few_shot.parquet", row=ConversationRow)
    facts = job.inputs["base_model"] / "facts.json"
    return Sample(
        snapshot=job.inputs["base_model"],
        weights=weights_key(given.base_version, library_versions("infer")),
        train=own_rows(job.inputs, "train", None),
        examples=list(examples),
        system=given.few_shot_system,
        advise=given.advise,
        settings=given.evaluation,
        schema=given.answer_schema,
        root=given.root,
        documents=given.documents,
        not_asked=given.not_asked,
        heldout_groups=given.heldout_groups,
        min_heldout=given.min_heldout,
        pairs=given.pairs,
        answers=given.answers,
        uniform=math.log(read_vocabulary(facts)),
    )


def read_vocabulary(facts: Path) -> int:
    """Return the size of a base's vocabulary."""
    import json

    return json.loads(facts.read_text())["vocabulary"]


if __name__ == "__main__":
    main(step)
