"""The asset `rival_answers`: what the rivals of the fine-tune answer to the held-out rows."""

import dagster as dg

from ft_assets.assets.judged import (
    base_models_that_answer,
    has_rivals,
    retrieving,
    rival_documents,
    rivals_identity,
)
from ft_assets.evaluation.rival_answers import TABLE, LocalBase
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import WARN, Materializer, result
from ft_assets.steps import rivals
from ft_assets.steps.answers import base_version


def _summary(metrics: Metrics) -> str:
    return f"{metrics['rivals'] or 'no rivals'} on {metrics['heldout_rows']} held-out rows"


@asset(
    deps=["heldout_split"],
    also=lambda project: ["base_model"] if base_models_that_answer(project) else [],
    group="evaluation",
    kinds=["parquet"],
    code_version="1",
    gpu=lambda project: bool(base_models_that_answer(project)),
    summary=_summary,
    only_if=has_rivals,
)
def rival_answers(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The answers of `evaluation.rivals` to the held-out prompts, with their price and latency.

    An answer is asked once: those of the last version and of other base models are kept.
    """
    name, project, store = context.partition_key, materializer.project, materializer.store
    split = store.need("heldout_split", name)
    names = base_models_that_answer(project, name)

    def step() -> rivals.Settings:
        current = [store.current("rival_answers", other) for other in project.base_models]
        given = {
            "evaluation": project.recipe(name).evaluation,
            "earlier": tuple(one.path / TABLE for one in current if one),
            **({"documents": documents} if (documents := rival_documents(project, name)) else {}),
        }
        if not names:
            return rivals.Settings(**given)
        return rivals.OnGpu(**given, bases=tuple(_local(materializer, base) for base in names))

    artifact, reused = materializer.materialize(
        context,
        identity=rivals_identity(materializer, name),
        inputs={"heldout_split#heldout": (split, "heldout")},
        step=step,
        libraries="infer" if names else None,
    )
    every_row = dg.MetadataValue.path(str(artifact.path / TABLE))
    return result(artifact, reused, ("rivals", "heldout_rows"), every_row=every_row)


def _local(materializer: Materializer, base: str) -> LocalBase:
    """Return a base model that answers, with the answers that the graph has of it."""
    store = materializer.store
    snapshot = store.verified(store.need("base_model", base))
    answers = store.current("answers", base)
    return LocalBase(
        name=base,
        snapshot=snapshot.path,
        version=base_version(snapshot.data_version),
        answers=answers.path if answers else None,
    )


@check(rival_answers, description="Each endpoint reports which model answered, and counts tokens.")
def rivals_report_their_model(checked: Checked) -> dg.AssetCheckResult:
    """Warn if an endpoint names no model or no tokens: another model may answer, at any price."""
    from ft_assets.evaluation.rival_answers import read_answers

    answers = read_answers(checked.artifact.path / TABLE)
    silent = sorted({one.rival for one in answers if one.model is None or one.tokens_out is None})
    return dg.AssetCheckResult(
        passed=not silent,
        severity=WARN,
        description=f"not reported by {', '.join(silent)}"
        if silent
        else f"models: {checked.metrics['models']}",
    )


@check(
    rival_answers,
    description="The documents that rivals search do not have held-out rows themselves.",
    only_if=lambda project: any(retrieving(project, name) for name in project.base_models),
)
def documents_have_no_heldout_rows(checked: Checked) -> dg.AssetCheckResult:
    """Warn if question and answer of held-out rows stand in one chunk, or if nothing is found."""
    texts, passed = [], True
    for rival in retrieving(checked.project, checked.name):
        copied, none, rows = (
            int(checked.metrics[key])
            for key in (f"{rival}_copied", f"{rival}_without_hits", "heldout_rows")
        )
        passed = passed and not copied and none < rows
        texts.append(
            f"{rival}: the documents have question and answer of {copied} of {rows} rows; "
            f"{none} questions find nothing"
        )
    return dg.AssetCheckResult(
        passed=passed,
        severity=WARN,
        description="; ".join(texts) or "this base model has no rival with documents",
    )
