"""The asset `raw_text`: the documents of continued pretraining."""

import dagster as dg

from ft_assets.assets.raw_rows import ingested, read_columns, validity
from ft_assets.config import Project
from ft_assets.data.canonical import conversation
from ft_assets.data.content import TEXT
from ft_assets.data.tables import CONVERSATION
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import Materializer


def has_text(project: Project) -> bool:
    """Return True if the project has a stage of continued pretraining."""
    return bool(project.data.text)


def text_stage(*assets: str):
    """Return the function that names further inputs of an asset: `assets`, with the stage."""
    return lambda project: assets if has_text(project) else ()


def _summary(metrics: Metrics) -> str:
    return f"{metrics['documents_rows']} documents"


@asset(
    sources=[TEXT],
    group="data",
    kinds=["text", "parquet"],
    code_version="2",
    schema=CONVERSATION.schema,
    per_base_model=False,
    summary=_summary,
    only_if=has_text,
)
def raw_text(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The documents of data.text, each once, with a stable id."""
    sources = {TEXT: ("documents", conversation)}
    return ingested(context, materializer, sources, CONVERSATION, "documents")


@check(
    raw_text,
    blocking=True,
    description="At most data.max_invalid of the documents are invalid.",
    fix="correct the documents (ft status --left-out names each), or raise data.max_invalid",
)
def documents_are_valid(checked: Checked) -> dg.AssetCheckResult:
    """Fail above data.max_invalid. Warn if any document was rejected."""
    return validity(checked)


@check(
    raw_text,
    description="No text column of the documents is left unread, but those of data.ignored.",
)
def document_columns_are_read(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the columns that are not read."""
    return read_columns(checked)
