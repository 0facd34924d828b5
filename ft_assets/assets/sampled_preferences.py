"""The asset `sampled_preferences`: preference pairs of the SFT model's own answers."""

from pathlib import Path

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.judged import own_answer_scoring
from ft_assets.assets.own_rehearsal import own_rehearsal_of, own_rehearsal_stage
from ft_assets.data.leakage import copies_of_held_out, texts
from ft_assets.data.tables import OWN_ANSWER, TOKENIZED_PREFERENCE, Table, write_table
from ft_assets.job import StepResult
from ft_assets.markdown import table
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import WARN, Materializer, result
from ft_assets.rows.types import OwnAnswerRow
from ft_assets.steps import sample

GIVEN = "dpo.pairs is given: nothing is sampled"
SHOWN = 20  # rows in the metadata
CELL = 160  # characters of a cell


def _summary(metrics: Metrics) -> str:
    if "prompts" not in metrics:
        return GIVEN
    share = f"{metrics['right_share']:.0%} of the answers right"
    return f"{metrics['pairs']} pairs from {metrics['prompts']} prompts, {share}"


@asset(
    deps=["base_model", "recipe", "heldout_split", "raw_dataset", "lora_adapter"],
    group="training",
    kinds=["parquet"],
    code_version="1",
    gpu=True,
    schema=TOKENIZED_PREFERENCE.schema,
    only_if=lambda project: project.samples(),
    summary=_summary,
    also=own_rehearsal_stage("own_rehearsal"),
)
def sampled_preferences(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Preference pairs of the SFT model's own answers to the train prompts.

    The metric of the verdict scores each answer. The best one is chosen against the worst, or the
    reference where none is right. DPO's validation pairs come from the validation rows.
    """
    name, project, store = context.partition_key, materializer.project, materializer.store
    chosen = project.recipe(name)
    if not chosen.dpo.samples:
        artifact, reused = materializer.materialize(context, identity={}, make=_empty)
        return result(artifact, reused)
    split, raw = store.need("heldout_split", name), store.need("raw_dataset", None)
    limits = {
        "max_length": chosen.chat.max_length,
        "near_duplicate": project.data.near_duplicate,
        "quoted": project.data.quoted,
    }
    scoring = own_answer_scoring(materializer, name)
    read = ("train", "validation", "heldout", "retention")
    artifact, reused = materializer.materialize(
        context,
        identity={"sampling": chosen.dpo.sampling.model_dump(mode="json"), **scoring, **limits},
        inputs={
            "base_model": (store.need("base_model", name), None),
            "lora_adapter": (store.need("lora_adapter", name), None),
            **{f"heldout_split#{part}": (split, part) for part in read},
            **{f"raw_dataset#{part}": (raw, part) for part in ("rehearsal", "contamination")},
            **own_rehearsal_of(materializer, name),
        },
        step=lambda: sample.Settings(
            sampling=chosen.dpo.sampling,
            evaluation=chosen.evaluation,
            answer_schema=scoring["schema"],
            root=project.root,
            **limits,
        ),
        libraries="infer",
    )
    first = ("pairs", "validation_pairs", "right_share", "some_right_share")
    file = artifact.path / "info" / "answers.parquet"
    shown = dg.MetadataValue.md(_first_answers(artifact))
    return result(
        artifact, reused, first, answers=shown, every_answer=dg.MetadataValue.path(str(file))
    )


def _empty(folder: Path) -> StepResult:
    (folder / "info").mkdir()
    write_table(folder / "info" / "answers.parquet", [], OWN_ANSWER)
    versions = {
        name: write_table(folder / f"{name}.parquet", [], TOKENIZED_PREFERENCE)
        for name in sample.SIDES.values()
    }
    return StepResult({"pairs": 0, "validation_pairs": 0}, versions)


def _first_answers(artifact: Artifact) -> str:
    """Return the first answers as a table in Markdown."""
    lines = []
    for row in Table[OwnAnswerRow](artifact.path / "info" / "answers.parquet"):
        if len(lines) == SHOWN:
            break
        texts_of_row = [_cell(row[key]) for key in ("prompt", "reference", "answer")]
        lines.append(
            [*texts_of_row, str(row["times"]), f"{row['score']:.2f}", row["used"], row["outcome"]]
        )
    return table(["prompt", "reference", "answer", "times", "score", "used", "outcome"], lines)


def _cell(text: str) -> str:
    return " ".join(text.split())[:CELL].replace("|", "\\|")


@check(
    sampled_preferences,
    blocking=True,
    description="No sampled pair repeats a held-out row, not even its answer.",
    fix="materialize sampled_preferences again: ft run {base}",
)
def sampled_pairs_do_not_leak(checked: Checked) -> dg.AssetCheckResult:
    """Fail with the first pair that repeats a held-out row."""
    store, data = checked.materializer.store, checked.project.data
    raw = store.verified(store.need("raw_dataset", None))
    split = store.verified(store.need("heldout_split", checked.name))
    copies = copies_of_held_out(
        {name: texts(checked.artifact.path / f"{name}.parquet") for name in sample.SIDES.values()},
        split.path,
        raw.path / "contamination.parquet",
        near_duplicate=data.near_duplicate,
        quoted=data.quoted,
    )
    left_out = checked.metrics.get("outcome_leak", 0)
    found = f"{copies[0]['id']} repeats {copies[0]['of']} ({len(copies)} in all)" if copies else ""
    text = found or f"no pair repeats a held-out row; {left_out} that did were left out"
    return dg.AssetCheckResult(passed=not copies, description=text)


@check(sampled_preferences, description="The SFT model's answers differ enough to make pairs.")
def answers_make_pairs(checked: Checked) -> dg.AssetCheckResult:
    """Warn if fewer than one prompt in twenty gives a pair, with the outcomes."""
    metrics = checked.metrics
    if "prompts" not in metrics:
        return dg.AssetCheckResult(passed=True, description=GIVEN)
    outcomes = ", ".join(
        f"{name.removeprefix('outcome_').replace('_', ' ')} {count}"
        for name, count in metrics.items()
        if name.startswith("outcome_")
    )
    return dg.AssetCheckResult(
        passed=metrics["pairs"] * 20 >= metrics["prompts"],
        severity=WARN,
        description=f"{metrics['pairs']} pairs of {metrics['prompts']} prompts: {outcomes}",
    )
