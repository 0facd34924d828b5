"""The asset `raw_dataset`: validated conversations in one canonical form."""

import dagster as dg

from ft_assets.assets.raw_rows import ToCanonical, ingested, read_columns, validity
from ft_assets.data.canonical import conversation, prompt
from ft_assets.data.content import CONVERSATIONS, PRODUCTION, PROMPTS
from ft_assets.data.ingest import target
from ft_assets.data.tables import CONVERSATION
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import Materializer


def _summary(metrics: Metrics) -> str:
    rejected = metrics.get("rejected")
    return f"{metrics['conversations_rows']} rows" + (f", {rejected} rejected" if rejected else "")


@asset(
    sources=[*CONVERSATIONS, PRODUCTION, PROMPTS],
    group="data",
    kinds=["json", "parquet"],
    code_version="9",
    schema=CONVERSATION.schema,
    per_base_model=False,
    summary=_summary,
)
def raw_dataset(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Validated conversations in one canonical form, each row with a stable id.

    Tables: training, held-out, retention, few-shot, contamination and production rows.
    """
    sources: dict[str, tuple[str, ToCanonical]] = {
        key: (table, target if key == "contamination" else conversation)
        for key, table in CONVERSATIONS.items()
    }
    for key in (PRODUCTION, PROMPTS):
        if getattr(materializer.project.data, key):
            sources[key] = (key, prompt)
    return ingested(context, materializer, sources, CONVERSATION, "conversations")


@check(
    raw_dataset,
    blocking=True,
    description="At most data.max_invalid of the rows of each source are invalid.",
    fix="correct the rows (ft status --left-out names each), or raise data.max_invalid",
)
def rows_are_valid(checked: Checked) -> dg.AssetCheckResult:
    """Fail above data.max_invalid in any source. Warn if any row was rejected."""
    return validity(checked)


@check(
    raw_dataset,
    description="No text column of the conversations is left unread, but those of data.ignored.",
)
def columns_are_read(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the columns that are not read."""
    return read_columns(checked)
