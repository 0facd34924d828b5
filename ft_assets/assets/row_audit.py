"""The asset `row_audit`: the training rows that are probably wrong, with the reasons."""

import itertools

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.own_rehearsal import own_rehearsal_of, own_rehearsal_stage
from ft_assets.assets.raw_text import has_text, text_stage
from ft_assets.data.tables import AUDIT, Table
from ft_assets.markdown import table
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.links import rows_path
from ft_assets.orchestration.materializer import WARN, Inputs, Materializer, result
from ft_assets.orchestration.memory_forecast import settle_method
from ft_assets.release.card_facts import continued
from ft_assets.rows.types import AuditRow
from ft_assets.steps import audit

SHOWN = 50  # rows in the metadata
CELL = 160  # characters of a cell
REASONS = ("wrong_answer", "contradiction", "outlier", "personal_data", "secret")  # metrics


def _summary(metrics: Metrics) -> str:
    counts = [f"{reason.replace('_', ' ')} {metrics[reason]}" for reason in _named(metrics)]
    return f"{metrics['rows']} rows: {', '.join(counts) or 'none is named'}"


def _named(metrics: Metrics) -> list[str]:
    return [reason for reason in REASONS if metrics.get(reason)]


@asset(
    deps=["base_model", "recipe", "heldout_split", "raw_dataset", "lora_adapter"],
    group="evaluation",
    kinds=["parquet"],
    code_version="2",
    gpu=True,
    schema=AUDIT.schema,
    only_if=lambda project: project.audit is not None,
    also=lambda project: (
        *text_stage("text_adapter")(project),
        *own_rehearsal_stage("own_rehearsal")(project),
    ),
    summary=_summary,
)
def row_audit(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The train rows that are probably wrong: answers, contradictions, outliers, private data.

    Short trainings from the same base, each without a fold of the rows, score the rows of the fold.
    Held-out rows are not read.
    """
    name, project, store = context.partition_key, materializer.project, materializer.store
    base, split = store.need("base_model", name), store.need("heldout_split", name)
    raw, chosen, settings = store.need("raw_dataset", None), project.recipe(name), project.audit
    assert settings is not None, "only_if"
    before: Inputs = {}
    if has_text(project):
        text = store.need("text_adapter", name)
        before, lora = {"text_adapter": (text, None)}, continued(chosen.lora, text)
    else:
        lora = settle_method(project, base, split, name)
    near = project.data.near_duplicate
    artifact, reused = materializer.materialize(
        context,
        identity={
            "audit": settings.model_dump(mode="json"),
            "lora": lora.model_dump(mode="json"),
            "sft": audit.short(chosen.sft, settings).decisive(),
            "near_duplicate": near,
        },
        inputs={
            "base_model": (base, None),
            **before,
            "heldout_split#train": (split, "train"),
            "raw_dataset#rehearsal": (raw, "rehearsal"),
            **own_rehearsal_of(materializer, name),
        },
        step=audit.Settings(
            lora=lora,
            sft=chosen.sft,
            audit=settings,
            memory_limit_gb=project.memory_limit_gb,
        ),
        libraries="train",
        space=500_000_000,
    )
    return result(
        artifact,
        reused,
        ("named", *REASONS),
        rows_page=dg.MetadataValue.url(rows_path(base_model=name, named="any")),
        named_rows=dg.MetadataValue.md(_first(artifact)),
    )


def _first(artifact: Artifact) -> str:
    """Return the first named rows as a table in Markdown."""
    rows = list(itertools.islice(Table[AuditRow](artifact.path / audit.TABLE), SHOWN))
    if not rows:
        return "no row is named"
    lines = [
        [row["reason"], f"{row['score']:.2f}", row["source"], row["id"][:8]]
        + [" ".join(row[key].split())[:CELL] for key in ("problem", "text", "answer")]
        for row in rows
    ]
    header = ["reason", "score", "row", "id", "why", "question", "answer"]
    return f"{table(header, lines)}\n\n`ft rows --named any` lists all of them."


@check(row_audit, description="No training row is probably wrong or holds private data.")
def rows_are_right(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the numbers of rows that are named, by reason."""
    metrics = checked.metrics
    names = _named(metrics)
    text = ", ".join(f"{reason.replace('_', ' ')} {metrics[reason]}" for reason in names)
    if names:
        text += f", of {metrics['rows']} rows; correct them, or leave them out by data.exclude"
    return dg.AssetCheckResult(
        passed=not names, severity=WARN, description=text or f"none of {metrics['rows']} is named"
    )
