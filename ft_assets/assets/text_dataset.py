"""The asset `text_dataset`: documents as tokens, without those that repeat a held-out row."""

import dagster as dg

from ft_assets.assets.raw_text import has_text
from ft_assets.data.ingest import require_valid
from ft_assets.data.tables import TOKENIZED
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import WARN, Materializer, result
from ft_assets.steps import text_dataset as step

# Keys of `data` that decide which documents are trained.
DECISIVE = {"near_duplicate", "quoted", "max_left_out", "validation_share", "split_salt"}


def _summary(metrics: Metrics) -> str:
    text = f"{metrics['train_tokens']:,} tokens in {metrics['train_documents']} documents"
    return text + (f", {metrics['left_out']} left out" if metrics["left_out"] else "")


@asset(
    deps=["raw_text", "raw_dataset", "base_model", "recipe", "heldout_split"],
    group="data",
    kinds=["huggingface", "parquet"],
    code_version="1",
    schema=TOKENIZED.schema,
    summary=_summary,
    only_if=has_text,
)
def text_dataset(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The documents as this model's tokens: train and validation, in pieces of the context.

    A document that repeats a held-out or general row is left out.
    """
    store, name, data = materializer.store, context.partition_key, materializer.project.data
    documents, raw = store.need("raw_text", None), store.need("raw_dataset", None)
    require_valid(documents.metrics, data.max_invalid, documents.asset)
    split = store.need("heldout_split", name)
    max_length = materializer.project.recipe(name).chat.max_length
    artifact, reused = materializer.materialize(
        context,
        identity={"max_length": max_length, **data.model_dump(mode="json", include=DECISIVE)},
        inputs={
            "base_model": (store.need("base_model", name), None),
            "raw_text": (documents, None),
            "raw_dataset#contamination": (raw, "contamination"),
            **{f"heldout_split#{part}": (split, part) for part in ("heldout", "retention")},
        },
        step=step.Settings(max_length=max_length, data=data),
        libraries="text",
    )
    first = ("train_documents", "train_tokens", "validation_documents", "left_out")
    rows = {"dagster/partition_row_count": artifact.metrics["train_rows"]}
    return result(artifact, reused, first, **rows)


@check(
    text_dataset,
    blocking=True,
    description="The tokens of each document decode to its text, and hold no control token.",
    fix="take the token that is named out of the document, or remove the document",
)
def every_document_is_proven(checked: Checked) -> dg.AssetCheckResult:
    """Fail with the first document that is refused."""
    metrics = checked.metrics
    text = f"{metrics['refused']} documents could not be proven"
    text += f", first {metrics['first_refused']}" if metrics["refused"] else ""
    return dg.AssetCheckResult(passed=metrics["refused"] == 0, description=text)


@check(
    text_dataset,
    blocking=True,
    description="There are documents to train on that repeat no held-out or general row.",
    fix="add documents to data.text; `ft status --left-out` names those that were left out",
)
def documents_are_left(checked: Checked) -> dg.AssetCheckResult:
    """Fail without a trained document. Warn without one to validate on."""
    metrics = checked.metrics
    train, validation = metrics["train_documents"], metrics["validation_documents"]
    text = f"{train} documents are trained, {validation} are validation; {metrics['left_out']} "
    text += "repeat a held-out or general row and were left out; "
    text += f"{metrics['documents_in_pieces']} are longer than {metrics['max_length']} tokens and "
    text += "are trained in pieces"
    if train and not validation:
        text += ". Without a validation document overfitting is not seen: add documents"
        return dg.AssetCheckResult(passed=False, severity=WARN, description=text)
    return dg.AssetCheckResult(passed=bool(train), description=text)
