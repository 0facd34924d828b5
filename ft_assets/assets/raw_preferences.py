"""The asset `raw_preferences`: validated preference triples."""

import dagster as dg

from ft_assets.assets.raw_rows import ingested, read_columns, validity
from ft_assets.data.canonical import preference
from ft_assets.data.tables import PREFERENCE
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import Materializer


def _summary(metrics: Metrics) -> str:
    rows, labels = metrics.get("preferences_rows"), metrics.get("preferences_labels")
    if rows is None or not labels:
        return f"{metrics.get('rows') if rows is None else rows} pairs"
    return f"{rows - labels} pairs, {labels} labelled answers"


@asset(
    sources=["preferences"],
    group="data",
    kinds=["json", "parquet"],
    code_version="9",
    schema=PREFERENCE.schema,
    per_base_model=False,
    summary=_summary,
)
def raw_preferences(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Validated preference triples: a prompt, the chosen answer, the rejected answer.

    A labelled answer without a partner has one of the answers. Empty if finetune.yaml names no
    preferences.
    """
    sources = {"preferences": ("preferences", preference)}
    return ingested(context, materializer, sources, PREFERENCE, "preferences")


@check(
    raw_preferences,
    blocking=True,
    description="At most data.max_invalid of the preference pairs are invalid.",
    fix="correct the pairs (ft status --left-out names each), or raise data.max_invalid",
)
def pairs_are_valid(checked: Checked) -> dg.AssetCheckResult:
    """Fail above data.max_invalid. Warn if any pair was rejected."""
    return validity(checked)


@check(
    raw_preferences,
    description="No text column of the preferences is left unread, but those of data.ignored.",
)
def pair_columns_are_read(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the columns that are not read."""
    return read_columns(checked)
