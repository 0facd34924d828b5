"""Assets of one base model before it trains: base, recipe, chat dataset, split, and their checks."""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.raw_data import OWNERS, raw_dataset, raw_preferences, schema_metadata
from ft_assets.config import settings_version
from ft_assets.data.ingest import require_valid
from ft_assets.data.leakage import leaks
from ft_assets.data.split import make_split
from ft_assets.data.tables import TOKENIZED
from ft_assets.evaluation.plots import data_uri, length_plot
from ft_assets.job import StepResult
from ft_assets.models.source import read_template, source_identity
from ft_assets.orchestration.materializer import ERROR, WARN, Materializer, result, user_errors

SPLITTING = {
    "heldout_share",
    "validation_share",
    "split_salt",
    "near_duplicate",
    "quoted",
    "stratify",
}


def _lengths(artifact: Artifact, name: str) -> dict[str, Any]:
    """Return the picture of the conversations' lengths, and what other limits would cost."""
    lengths = json.loads((artifact.path / "info" / "lengths.json").read_text())["conversations"]
    if not lengths["counts"]:
        return {}
    picture = length_plot(lengths, artifact.metrics["max_length"])
    lines = ["| chat.max_length | rows left out | tokens kept |", "|---:|---:|---:|"]
    lines += [
        f"| {limit} | {cost['left_out']} | {cost['tokens_percent']} % |"
        for limit, cost in lengths["limits"].items()
    ]
    shown = f"![lengths of {name}]({data_uri(picture)})\n\n" + "\n".join(lines)
    return {"lengths": dg.MetadataValue.md(shown)}


def _strata(strata: dict[str, dict[str, int]]) -> str:
    lines = ["| stratum | train | validation | held-out |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {sides['train']} | {sides['validation']} | {sides['heldout']} |"
        for name, sides in sorted(strata.items())
    ]
    return "\n".join(lines)


def dataset_assets(
    base_models: dg.PartitionsDefinition,
) -> tuple[list[dg.AssetsDefinition], list[dg.AssetChecksDefinition]]:
    """Return the assets and checks, partitioned by base model."""

    @dg.asset(
        partitions_def=base_models,
        group_name="model",
        owners=OWNERS,
        kinds={"huggingface"},
        code_version="6",
    )
    def base_model(
        context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.MaterializeResult:
        """The resolved base: a bf16 snapshot with tokenizer and chat template, from a hub commit, a folder or a GGUF file."""
        project, name = materializer.project, context.partition_key
        with user_errors():
            settings, root = project.base_model(name), project.root
            chat = project.recipe(name).chat
            template = read_template(name, chat.chat_template, root)
            identity = source_identity(name, settings, root)
            artifact, reused = materializer.materialize(
                context,
                settings={
                    "identity": identity,
                    "template": template,
                    "trust_remote_code": settings.trust_remote_code,
                    "baked": chat.baked(),
                },
                step="base_model",
                step_settings={
                    "model": settings.model_dump(),
                    "chat": chat.model_dump(mode="json"),
                    "root": str(root),
                },
                libraries="text",
                space=1_000_000_000,
            )
            source = settings.hub or settings.gguf or settings.folder
            return result(artifact, reused, source=str(source), commit=identity.get("commit", "–"))

    @dg.asset(
        partitions_def=base_models,
        group_name="model",
        owners=OWNERS,
        kinds={"json"},
        code_version="1",
    )
    def recipe(
        context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.MaterializeResult:
        """The resolved settings of this base model: defaults of finetune.yaml with the model's own overrides."""
        with user_errors():
            resolved = materializer.project.recipe(context.partition_key)
            sections = {
                name: settings_version(getattr(resolved, name))
                for name in type(resolved).model_fields
            }

            def make(output: Path) -> StepResult:
                (output / "recipe.json").write_text(resolved.model_dump_json(indent=1))
                return StepResult({}, sections)

            artifact, reused = materializer.materialize(
                context, settings=resolved.model_dump(mode="json"), make=make
            )
            return result(
                artifact, reused, recipe=dg.MetadataValue.json(resolved.model_dump(mode="json"))
            )

    @dg.asset(
        partitions_def=base_models,
        deps=[raw_dataset, raw_preferences, base_model, recipe],
        group_name="data",
        owners=OWNERS,
        kinds={"huggingface", "parquet"},
        code_version="4",
        metadata=schema_metadata(TOKENIZED),
    )
    def chat_dataset(
        context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.MaterializeResult:
        """Every conversation rendered and tokenized with this model's template, with the loss mask; each row proven."""
        store, name = materializer.store, context.partition_key
        with user_errors():
            raw, pairs = store.need("raw_dataset", None), store.need("raw_preferences", None)
            for source in (raw, pairs):  # a failed check holds only within its own run
                require_valid(
                    source.metrics, materializer.project.data.max_invalid, source.manifest["asset"]
                )
            artifact, reused = materializer.materialize(
                context,
                settings=materializer.project.recipe(name).chat.model_dump(include={"max_length"}),
                inputs={
                    "base_model": (store.need("base_model", name), None),
                    **{
                        f"raw_dataset#{part}": (raw, part)
                        for part in ("conversations", "rehearsal", "heldout", "retention")
                    },
                    "raw_preferences": (pairs, None),
                },
                step="chat",
                libraries="text",
            )
            return result(
                artifact,
                reused,
                **_lengths(artifact, name),
                **{"dagster/partition_row_count": artifact.metrics["conversations_rows"]},
            )

    @dg.asset_check(
        asset=chat_dataset,
        blocking=True,
        partitions_def=base_models,
        description="Train context equals generation context, the mask covers the answer and its end of turn, one BOS: on every row.",
    )
    @user_errors()
    def every_row_is_proven(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Fail if the template could not be proven right for any row, or if base and fine-tune would answer in different modes."""
        metrics = materializer.store.need("chat_dataset", context.partition_key).metrics
        text = f"{metrics['refused']} of {metrics['total']} rows could not be proven" + (
            f", first {metrics['first_refused']}" if metrics["refused"] else ""
        )
        if switch := metrics["template_switch"]:
            # The base would think aloud and be cut off, the fine-tune has learnt not to: the comparison would flatter it.
            text += f"; the template writes {metrics['template_adds']} before answers: set chat.template_kwargs: {{{switch}: false}}"
        return dg.AssetCheckResult(passed=metrics["refused"] == 0 and not switch, description=text)

    @dg.asset_check(
        asset=chat_dataset,
        blocking=True,
        partitions_def=base_models,
        description="Few rows are longer than chat.max_length; a longer row is left out whole, never cut.",
    )
    @user_errors()
    def few_rows_are_too_long(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Fail above chat.max_truncated, warn if any row is too long."""
        metrics, chat = (
            materializer.store.need("chat_dataset", context.partition_key).metrics,
            materializer.project.recipe(context.partition_key).chat,
        )
        left_out = sum(value for key, value in metrics.items() if key.endswith("_too_long"))
        share = left_out / metrics["total"] if metrics["total"] else 0.0
        text = f"{left_out} of {metrics['total']} rows are longer than {metrics['max_length']} tokens and were left out"
        return dg.AssetCheckResult(
            passed=left_out == 0,
            severity=ERROR if share > chat.max_truncated else WARN,
            description=text,
        )

    @dg.asset(
        partitions_def=base_models,
        deps=[chat_dataset, raw_dataset],
        group_name="data",
        owners=OWNERS,
        kinds={"parquet"},
        code_version="6",
        metadata=schema_metadata(TOKENIZED),
    )
    def heldout_split(
        context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.MaterializeResult:
        """Train and held-out rows by hash of their prompt: the same for every base model, and growing data moves no row."""
        data = materializer.project.data
        with user_errors():
            chat = materializer.store.need("chat_dataset", context.partition_key)

            raw = materializer.store.need("raw_dataset", None)
            targets = raw.path / "contamination.parquet"
            artifact, reused = materializer.materialize(
                context,
                settings=data.model_dump(mode="json", include=SPLITTING),
                inputs={
                    "chat_dataset": (chat, None),
                    "raw_dataset#contamination": (raw, "contamination"),
                },
                make=lambda output: StepResult(*make_split(chat.path, targets, output, data)),
            )
            strata = json.loads((artifact.path / "info" / "strata.json").read_text())
            shown = {"strata": dg.MetadataValue.md(_strata(strata))} if strata else {}
            return result(
                artifact,
                reused,
                **shown,
                **{"dagster/partition_row_count": artifact.metrics["train_rows"]},
            )

    @dg.asset_check(
        asset=heldout_split,
        blocking=True,
        partitions_def=base_models,
        description="No prompt stands on two sides: train, preferences, held-out, retention.",
    )
    @user_errors()
    def nothing_leaks(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Fail with the first offending pair of ids (train and preferences may share prompts)."""
        split, raw, data = (
            materializer.store.need("heldout_split", context.partition_key),
            materializer.store.need("raw_dataset", None),
            materializer.project.data,
        )
        found, counts = leaks(
            split.path, raw.path / "contamination.parquet", raw.path / "few_shot.parquet", data
        )
        if found:
            text = f"{found[0]} ({len(found)} in all)"
        else:
            text = "no prompt stands on two sides" + (
                f", nor one that is {data.near_duplicate:.0%} alike" if data.near_duplicate else ""
            )
        return dg.AssetCheckResult(passed=not found, description=text, metadata=counts)

    @dg.asset_check(
        asset=heldout_split,
        partitions_def=base_models,
        description="Every value of data.stratify's field has held-out rows.",
    )
    @user_errors()
    def strata_are_held_out(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Warn with the strata of which no row is held out: the verdict says nothing about them."""
        path = materializer.store.need("heldout_split", context.partition_key).path
        strata = json.loads((path / "info" / "strata.json").read_text())
        missing = [name for name, sides in strata.items() if not sides["heldout"]]
        text = (
            f"{len(strata) - len(missing)} of {len(strata)} strata have held-out rows"
            if strata
            else "data.stratify is not set"
        )
        text += (
            f"; none: {', '.join(missing[:10])}; raise data.stratify.shares for them"
            if missing
            else ""
        )
        return dg.AssetCheckResult(passed=not missing, severity=WARN, description=text)

    @dg.asset_check(
        asset=heldout_split,
        partitions_def=base_models,
        description="Enough held-out rows to tell a better model from luck.",
    )
    @user_errors()
    def heldout_is_large_enough(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Warn below gate.min_heldout_rows."""
        rows, least = (
            materializer.store.need("heldout_split", context.partition_key).metrics["heldout_rows"],
            materializer.project.gate.min_heldout_rows,
        )
        return dg.AssetCheckResult(
            passed=rows >= least,
            severity=WARN,
            description=f"{rows} held-out rows; gate.min_heldout_rows is {least}",
        )

    assets = [base_model, recipe, chat_dataset, heldout_split]
    return assets, [
        every_row_is_proven,
        few_rows_are_too_long,
        nothing_leaks,
        strata_are_held_out,
        heldout_is_large_enough,
    ]
