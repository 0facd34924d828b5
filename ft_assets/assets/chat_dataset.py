"""The asset `chat_dataset`: rows rendered and tokenized with the model's own template."""

import json

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.own_rehearsal import own_rehearsal_of, own_rehearsal_stage
from ft_assets.compat.dagster import TO_DO
from ft_assets.config import DataSettings
from ft_assets.data.ingest import require_valid
from ft_assets.data.mixing import source_name, source_tokens
from ft_assets.data.tables import TOKENIZED
from ft_assets.evaluation.plots import data_uri, length_plot
from ft_assets.markdown import table
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import ERROR, WARN, Materializer, result
from ft_assets.steps import chat


def _summary(metrics: Metrics) -> str:
    return f"{metrics['tokens']:,} tokens in {metrics['conversations_rows']} rows"


@asset(
    deps=["raw_dataset", "raw_preferences", "base_model", "recipe"],
    group="data",
    kinds=["huggingface", "parquet"],
    code_version="10",
    schema=TOKENIZED.schema,
    summary=_summary,
    also=own_rehearsal_stage("own_rehearsal"),
)
def chat_dataset(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Every conversation rendered and tokenized with this model's template, with the loss mask.

    Each row is proven.
    """
    store, name = materializer.store, context.partition_key
    raw, pairs = store.need("raw_dataset", None), store.need("raw_preferences", None)
    for source in (raw, pairs):  # a failed check blocks only within its own run
        require_valid(source.metrics, materializer.project.data.max_invalid, source.asset)
    max_length = materializer.project.recipe(name).chat.max_length
    artifact, reused = materializer.materialize(
        context,
        identity={"max_length": max_length},
        inputs={
            "base_model": (store.need("base_model", name), None),
            **{
                f"raw_dataset#{part}": (raw, part)
                for part in ("conversations", "rehearsal", "heldout", "retention")
            },
            "raw_preferences": (pairs, None),
            **own_rehearsal_of(materializer, name),
        },
        step=chat.Settings(max_length=max_length),
        libraries="text",
    )
    return result(
        artifact,
        reused,
        first=("conversations_rows", "preferences_rows", "tokens", "supervised_tokens"),
        **_lengths(artifact, name),
        **_sources(materializer.project.data, raw, artifact),
        **{"dagster/partition_row_count": artifact.metrics["conversations_rows"]},
    )


def _sources(
    data: DataSettings, raw: Artifact, artifact: Artifact
) -> dict[str, dg.MarkdownMetadataValue]:
    """Return the rows and tokens of each source. Today's entries decide, not those of the step."""
    lines = source_tokens(data, raw.path, artifact.path)
    total = sum(line.tokens for line in lines) or 1
    cells = [
        [
            source_name(line.key, line.path),
            f"{line.rows:,}",
            f"{line.tokens:,}",
            f"{line.tokens / total:.1%}",
        ]
        for line in lines
    ]
    shown = table(["source", "rows", "tokens", "share"], cells)
    return {"sources": dg.MetadataValue.md(shown)} if len(lines) > 1 else {}


def _lengths(artifact: Artifact, name: str) -> dict[str, dg.MarkdownMetadataValue]:
    """Plot the lengths of the conversations, with the cost of other values of chat.max_length."""
    lengths = json.loads((artifact.path / "info" / "lengths.json").read_text())["conversations"]
    if not lengths["counts"]:
        return {}
    picture = data_uri(length_plot(lengths, artifact.metrics["max_length"]))
    lines = ["| chat.max_length | rows filtered | tokens kept |", "|---:|---:|---:|"]
    lines += [
        f"| {limit} | {cost['left_out']} | {cost['tokens_percent']} % |"
        for limit, cost in lengths["limits"].items()
    ]
    shown = f"![lengths of {name}]({picture})\n\n" + "\n".join(lines)
    return {"lengths": dg.MetadataValue.md(shown)}


@check(
    chat_dataset,
    blocking=True,
    description="On every row the train context equals the generation context, the loss mask "
    "covers the answer and its end of turn, and there is one BOS.",
    fix="correct the row that is named, or see docs/templates.md for what a template can prove",
)
def every_row_is_proven(checked: Checked) -> dg.AssetCheckResult:
    """Fail if a row is not proven, or if base and fine-tune would answer in different modes."""
    metrics = checked.metrics
    text = f"{metrics['refused']} of {metrics['total']} rows could not be proven"
    if metrics["refused"]:
        text += f", first {metrics['first_refused']}"
    if switch := metrics["template_switch"]:
        # The base would think aloud and be cut off. The fine-tune has learnt not to think aloud.
        # The comparison would flatter the fine-tune.
        text += f"; the template writes {metrics['template_adds']} before answers"
    return dg.AssetCheckResult(
        passed=metrics["refused"] == 0 and not switch,
        description=text,
        metadata={TO_DO: f"set chat.template_kwargs: {{{switch}: false}}"} if switch else {},
    )


@check(
    chat_dataset,
    blocking=True,
    description="Few rows are longer than chat.max_length. A longer row is filtered, never cut.",
    fix="raise chat.max_length, shorten the rows, or raise chat.max_truncated",
)
def few_rows_are_too_long(checked: Checked) -> dg.AssetCheckResult:
    """Fail above chat.max_truncated. Warn if any row is too long."""
    metrics = checked.metrics
    most = checked.project.recipe(checked.name).chat.max_truncated
    filtered = sum(value for key, value in metrics.items() if key.endswith("_too_long"))
    total = metrics["total"]
    share = filtered / total if total else 0.0
    return dg.AssetCheckResult(
        passed=filtered == 0,
        severity=ERROR if share > most else WARN,
        description=f"{filtered} of {total} rows are longer than {metrics['max_length']} tokens "
        "and were filtered",
    )
