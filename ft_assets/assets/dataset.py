"""Assets of one base model before it trains: base, recipe, chat dataset, split, and their checks."""

from pathlib import Path

import dagster as dg

from ft_assets.assets.data import OWNERS, raw_dataset, raw_preferences, schema_metadata
from ft_assets.assets.workshop import ERROR, WARN, Workshop, result, user_errors
from ft_assets.config import settings_version
from ft_assets.data.near import near_duplicates
from ft_assets.data.split import make_split, overlaps
from ft_assets.data.tables import NEAR_DUPLICATE, TOKENIZED, TOKENIZED_PREFERENCE, read_table, rows_version, write_table
from ft_assets.job import StepResult
from ft_assets.models.source import read_template, source_identity


def dataset_assets(base_models: dg.PartitionsDefinition) -> tuple[list[dg.AssetsDefinition], list[dg.AssetChecksDefinition]]:
    """Return the assets and checks, partitioned by base model."""

    @dg.asset(partitions_def=base_models, group_name="model", owners=OWNERS, kinds={"huggingface"}, code_version="2")
    def base_model(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """The resolved base: a bf16 snapshot with tokenizer and chat template, from a hub commit, a folder or a GGUF file."""
        project, name = workshop.project, context.partition_key
        with user_errors():
            settings, root = project.base_model(name), project.root
            template = read_template(name, project.recipe(name).chat.chat_template, root)
            identity = source_identity(name, settings, root)
            artifact, reused = workshop.materialize(
                context,
                settings={"identity": identity, "template": template, "trust_remote_code": settings.trust_remote_code},
                step="base_model",
                step_settings={"model": settings.model_dump(), "root": str(root)},
                libraries="text",
                space=1_000_000_000,
            )
        source = settings.hub or settings.gguf or settings.folder
        return result(artifact, reused, source=str(source), commit=identity.get("commit", "–"))

    @dg.asset(partitions_def=base_models, group_name="model", owners=OWNERS, kinds={"json"}, code_version="1")
    def recipe(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """The resolved settings of this base model: defaults of finetune.yaml with the model's own overrides."""
        with user_errors():
            resolved = workshop.project.recipe(context.partition_key)
            sections = {name: settings_version(getattr(resolved, name)) for name in type(resolved).model_fields}

            def make(output: Path) -> StepResult:
                (output / "recipe.json").write_text(resolved.model_dump_json(indent=1))
                return StepResult({}, sections)

            artifact, reused = workshop.materialize(context, settings=resolved.model_dump(mode="json"), make=make)
        return result(artifact, reused, recipe=dg.MetadataValue.json(resolved.model_dump(mode="json")))

    @dg.asset(
        partitions_def=base_models,
        deps=[raw_dataset, raw_preferences, base_model, recipe],
        group_name="data",
        owners=OWNERS,
        kinds={"huggingface", "parquet"},
        code_version="2",
        metadata=schema_metadata(TOKENIZED),
    )
    def chat_dataset(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """Every conversation rendered and tokenized with this model's template, with the loss mask; each row proven."""
        store, name = workshop.store, context.partition_key
        with user_errors():
            raw, pairs = store.need("raw_dataset", None), store.need("raw_preferences", None)
            artifact, reused = workshop.materialize(
                context,
                settings=workshop.project.recipe(name).chat.model_dump(mode="json"),
                inputs={
                    "base_model": (store.need("base_model", name), None),
                    **{f"raw_dataset#{part}": (raw, part) for part in ("conversations", "rehearsal", "heldout", "retention")},
                    "raw_preferences": (pairs, None),
                },
                step="chat",
                libraries="text",
            )
        return result(artifact, reused, **{"dagster/partition_row_count": artifact.metrics["conversations_rows"]})

    @dg.asset_check(
        asset=chat_dataset,
        blocking=True,
        partitions_def=base_models,
        description="Train context equals generation context, the mask covers the answer and its end of turn, one BOS: on every row.",
    )
    def every_row_is_proven(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Fail if the template could not be proven right for any row."""
        metrics = workshop.store.need("chat_dataset", context.partition_key).metrics
        text = f"{metrics['refused']} of {metrics['total']} rows could not be proven" + (
            f", first {metrics['first_refused']}" if metrics["refused"] else ""
        )
        return dg.AssetCheckResult(passed=metrics["refused"] == 0, description=text)

    @dg.asset_check(
        asset=chat_dataset,
        blocking=True,
        partitions_def=base_models,
        description="Few rows are longer than chat.max_length; a longer row is left out whole, never cut.",
    )
    def few_rows_are_too_long(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Fail above chat.max_truncated, warn if any row is too long."""
        metrics, chat = (
            workshop.store.need("chat_dataset", context.partition_key).metrics,
            workshop.project.recipe(context.partition_key).chat,
        )
        left_out = sum(value for key, value in metrics.items() if key.endswith("_too_long"))
        share = left_out / metrics["total"] if metrics["total"] else 0.0
        text = f"{left_out} of {metrics['total']} rows are longer than {chat.max_length} tokens and were left out"
        return dg.AssetCheckResult(passed=left_out == 0, severity=ERROR if share > chat.max_truncated else WARN, description=text)

    @dg.asset(
        partitions_def=base_models,
        deps=[chat_dataset],
        group_name="data",
        owners=OWNERS,
        kinds={"parquet"},
        code_version="4",
        metadata=schema_metadata(TOKENIZED),
    )
    def heldout_split(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """Train and held-out rows by hash of their prompt: the same for every base model, and growing data moves no row."""
        data = workshop.project.data
        with user_errors():
            chat = workshop.store.need("chat_dataset", context.partition_key)

            settings = {
                "share": data.heldout_share,
                "validation_share": data.validation_share,
                "salt": data.split_salt,
                "near_duplicate": data.near_duplicate,
            }

            def make(output: Path) -> StepResult:
                names = ("conversations", "rehearsal", "heldout", "retention", "preferences")
                made = make_split({name: read_table(chat.path / f"{name}.parquet") for name in names}, **settings)
                for name, side in made.sides.items():
                    write_table(output / f"{name}.parquet", side, TOKENIZED_PREFERENCE if name == "preferences" else TOKENIZED)
                (output / "info").mkdir()
                write_table(output / "info" / "near_duplicates.parquet", made.copies, NEAR_DUPLICATE)
                return StepResult(made.counts, {name: rows_version(side) for name, side in made.sides.items()})

            artifact, reused = workshop.materialize(
                context,
                settings={**settings, "fixed": bool(data.heldout)},
                inputs={"chat_dataset": (chat, None)},
                make=make,
            )
        return result(artifact, reused, **{"dagster/partition_row_count": artifact.metrics["train_rows"]})

    @dg.asset_check(
        asset=heldout_split,
        blocking=True,
        partitions_def=base_models,
        description="No prompt stands on two sides: train, preferences, held-out, retention.",
    )
    def nothing_leaks(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Fail with the first offending pair of ids (train and preferences may share prompts)."""
        path = workshop.store.need("heldout_split", context.partition_key).path
        sides = {name: read_table(path / f"{name}.parquet") for name in ("train", "validation", "preferences", "heldout", "retention")}
        train, pairs, validation = (sides.pop(name) for name in ("train", "preferences", "validation"))
        found = overlaps(trained=[*train, *pairs], **sides) + overlaps(train=train, validation=validation)
        threshold = workshop.project.data.near_duplicate
        kept_out = [*sides["heldout"], *sides["retention"]]
        copies = near_duplicates([*train, *validation, *pairs], kept_out, threshold) if threshold else []
        if found:
            text = f"{found[0][0]} {found[0][1]} and {found[0][2]} {found[0][3]} share their prompt ({len(found)} in all)"
        elif copies:
            text = f"trained {copies[0][0]} is nearly {copies[0][1]}, similarity {copies[0][2]:.2f} ({len(copies)} in all)"
        else:
            text = "no prompt stands on two sides" + (f", nor one that is {threshold:.0%} alike" if threshold else "")
        return dg.AssetCheckResult(
            passed=not found and not copies, description=text, metadata={"overlaps": len(found), "near_duplicates": len(copies)}
        )

    @dg.asset_check(asset=heldout_split, partitions_def=base_models, description="Enough held-out rows to tell a better model from luck.")
    def heldout_is_large_enough(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Warn below gate.min_heldout_rows."""
        rows, least = (
            workshop.store.need("heldout_split", context.partition_key).metrics["heldout_rows"],
            workshop.project.gate.min_heldout_rows,
        )
        return dg.AssetCheckResult(
            passed=rows >= least, severity=WARN, description=f"{rows} held-out rows; gate.min_heldout_rows is {least}"
        )

    assets = [base_model, recipe, chat_dataset, heldout_split]
    return assets, [every_row_is_proven, few_rows_are_too_long, nothing_leaks, heldout_is_large_enough]
