"""Step: ask all candidates for the held-out and general rows, and keep what they gave."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import JsonValue

from ft_assets.artifacts.environment import library_versions
from ft_assets.config import ADAPTERS, EvaluationSettings, settings_version
from ft_assets.data.tables import read_table
from ft_assets.evaluation.kept_answers import Answers, digest, read_kept
from ft_assets.evaluation.references import with_references
from ft_assets.evaluation.rival_answers import given_answers
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.models.loading import load_tokenizer
from ft_assets.rows.types import ConversationRow, TokenizedRow
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.evaluation.examples import Pool
    from ft_assets.evaluation.scorer import Task

# Raise it with a change of code that changes what a model answers: then nothing is kept.
VERSION = "4"


class Settings(StepSettings):
    """`few_shot_auto`: choose the examples of the prompted base, by `answer_schema` among others.

    `weights`: the version of each candidate's. `harness`: of its tasks, as in `asking`.

    `previous`: the folder of the last answers. `rivals`: tables of what base models answered as
    rivals of others.
    """

    STEP: ClassVar = Step("answers", gpu=True)

    evaluation: EvaluationSettings
    few_shot_system: str | None
    few_shot_auto: bool = False
    answer_schema: dict[str, JsonValue] | None = None
    weights: dict[str, str]
    harness: str
    seeds: int = 1
    root: Path
    previous: Path | None
    rivals: tuple[Path, ...] = ()


def base_version(base: str) -> str:
    """Return the version of the weights of a base, given that of its snapshot."""
    return settings_version([base, base])


def weights_key(version: str, libraries: dict[str, str]) -> str:
    """Return the identity of a candidate's weights in the digests of its answers."""
    return digest(VERSION, version, libraries)


@takes(Settings)
def step(job: Job, given: Settings, report: Report) -> StepResult:
    from ft_assets.evaluation.candidates import FURTHER_SEED, Candidates, ask
    from ft_assets.models.adapter_files import of_seed

    libraries = library_versions("infer")
    places = {name: place for name, place in ADAPTERS.items() if name in given.weights}
    adapters = {name: job.inputs[place] for name, place in places.items()}
    weights = {name: weights_key(version, libraries) for name, version in given.weights.items()}
    seeds = {
        f"{name}{FURTHER_SEED}{number}": (of_seed(adapter, number), digest(weights[name], number))
        for name, adapter in adapters.items()
        for number in range(1, given.seeds)
    }
    candidates = Candidates(
        snapshot=job.inputs["base_model"],
        adapters=adapters | {name: adapter for name, (adapter, _) in seeds.items()},
        weights=weights | {name: version for name, (_, version) in seeds.items()},
        harness=given.harness,
    )
    kept = read_kept(given.previous, report)
    for table in given.rivals:  # a rival of another base model may be this base
        kept.answers |= given_answers(table)
    pool = _pool(job, given.evaluation) if given.few_shot_auto else None
    answers = ask(candidates, _task(job, given), kept, report, pool)
    answers.write(job.output)
    return StepResult(_metrics(answers))


def _task(job: Job, given: Settings) -> Task:
    from ft_assets.evaluation.form import fitted_rows, has_few_answers
    from ft_assets.evaluation.scorer import Task

    settings, split = given.evaluation, job.inputs["heldout_split"]
    tokenizer = load_tokenizer(job.inputs["base_model"])
    heldout = read_table(split / "heldout.parquet", row=TokenizedRow)
    retention = read_table(split / "retention.parquet", settings.retention_rows, row=TokenizedRow)
    train = read_table(split / "train.parquet", row=TokenizedRow)
    judged = [row for row in train if row["judged"]]
    return Task(
        heldout=with_references(tokenizer, heldout),
        settings=settings,
        retention=with_references(tokenizer, retention),
        train=with_references(tokenizer, fitted_rows(settings, judged)),
        few_answers=has_few_answers(settings, judged),
        few_shot=read_table(job.inputs["raw_dataset"] / "few_shot.parquet", row=ConversationRow),
        few_shot_system=given.few_shot_system,
        schema=given.answer_schema,
        root=given.root,
    )


def _pool(job: Job, settings: EvaluationSettings) -> Pool:
    """Return the rows that the examples are chosen from, and those that they are chosen by."""
    from ft_assets.evaluation.examples import Pool
    from ft_assets.evaluation.form import with_known_answer

    split, tokenizer = job.inputs["heldout_split"], load_tokenizer(job.inputs["base_model"])
    sides = [
        [row for row in read_table(split / f"{side}.parquet", row=TokenizedRow) if row["judged"]]
        for side in ("train", "validation")
    ]
    known = [with_known_answer(settings, rows) for rows in sides]
    train, validation = (with_references(tokenizer, rows) for rows in known)
    return Pool(train, validation)


def _metrics(answers: Answers) -> dict[str, Any]:
    heldout = answers.rows["heldout"]
    return {
        "candidates": ", ".join(heldout),
        "heldout_rows": len(heldout["base"]),
        "retention_rows": len(answers.rows["retention"]["base"]),
        "generated_tokens": answers.cost.tokens,
        **({"slower": "; ".join(answers.cost.slower)} if answers.cost.slower else {}),
        **answers.cost.metrics(),
    }


if __name__ == "__main__":
    main(step)
