"""The asset `rival_answers`: what models behind endpoints answer to the held-out rows."""

import dagster as dg

from ft_assets.assets.judged import has_rivals, rivals_identity
from ft_assets.evaluation.rivals import TABLE
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import WARN, Materializer, result
from ft_assets.steps import rivals


def _summary(metrics: Metrics) -> str:
    return f"{metrics['rivals'] or 'no rivals'} on {metrics['heldout_rows']} held-out rows"


@asset(
    deps=["heldout_split"],
    group="evaluation",
    kinds=["parquet"],
    code_version="1",
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
    current = [store.current("rival_answers", other) for other in project.base_models]
    artifact, reused = materializer.materialize(
        context,
        identity=rivals_identity(project, name),
        inputs={"heldout_split#heldout": (split, "heldout")},
        step=lambda: rivals.Settings(
            evaluation=project.recipe(name).evaluation,
            earlier=tuple(one.path / TABLE for one in current if one),
        ),
    )
    every_row = dg.MetadataValue.path(str(artifact.path / TABLE))
    return result(artifact, reused, ("rivals", "heldout_rows"), every_row=every_row)


@check(rival_answers, description="Each endpoint reports which model answered, and counts tokens.")
def rivals_report_their_model(checked: Checked) -> dg.AssetCheckResult:
    """Warn if an endpoint names no model or no tokens: another model may answer, at any price."""
    from ft_assets.evaluation.rivals import read_answers

    answers = read_answers(checked.artifact.path / TABLE)
    silent = sorted({one.rival for one in answers if one.model is None or one.tokens_out is None})
    return dg.AssetCheckResult(
        passed=not silent,
        severity=WARN,
        description=f"not reported by {', '.join(silent)}"
        if silent
        else f"models: {checked.metrics['models']}",
    )
