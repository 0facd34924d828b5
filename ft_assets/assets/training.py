"""Assets of one base model up to its adapters: base, recipe, chat dataset, split, SFT, DPO."""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.data import OWNERS, raw_dataset, raw_preferences, schema_metadata
from ft_assets.assets.workshop import Workshop, result, user_errors
from ft_assets.config import settings_version
from ft_assets.data.split import apart, overlaps, split, without_groups
from ft_assets.data.tables import TOKENIZED, TOKENIZED_PREFERENCE, read_table, rows_version, write_table
from ft_assets.evaluation.plots import curve_plot, data_uri
from ft_assets.job import StepResult
from ft_assets.models.source import read_template, source_identity

GPU_POOL = "gpu"
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


def _curve(artifact: Artifact, title: str) -> dict[str, Any]:
    path = artifact.path / "info" / "curve.json"
    if not path.exists():
        return {}
    curve, watched = (json.loads(file.read_text()) if file.exists() else [] for file in (path, path.with_name("validation.json")))
    return {"loss_curve": dg.MetadataValue.md(f"![loss]({data_uri(curve_plot(curve, title, watched))})")}


def training_assets(base_models: dg.PartitionsDefinition) -> tuple[list[dg.AssetsDefinition], list[dg.AssetChecksDefinition]]:
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
        code_version="1",
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
        code_version="2",
        metadata=schema_metadata(TOKENIZED),
    )
    def heldout_split(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """Train and held-out rows by hash of their prompt: the same for every base model, and growing data moves no row."""
        data = workshop.project.data
        with user_errors():
            chat = workshop.store.need("chat_dataset", context.partition_key)

            def make(output: Path) -> StepResult:
                rows = {
                    name: read_table(chat.path / f"{name}.parquet")
                    for name in ("conversations", "rehearsal", "heldout", "retention", "preferences")
                }
                rest, heldout, removed = split(rows["conversations"], data.heldout_share, data.split_salt, rows["heldout"])
                train, validation = apart(rest, data.validation_share, data.split_salt)
                kept_out = {row["group"] for row in (*heldout, *rows["retention"])}
                pairs = without_groups(rows["preferences"], kept_out)
                rehearsal = without_groups(rows["rehearsal"], kept_out)
                parts = {}
                for name, side, schema in (
                    ("train", [*train, *rehearsal], TOKENIZED),
                    ("validation", validation, TOKENIZED),
                    ("heldout", heldout, TOKENIZED),
                    ("retention", rows["retention"], TOKENIZED),
                    ("preferences", pairs, TOKENIZED_PREFERENCE),
                ):
                    write_table(output / f"{name}.parquet", side, schema)
                    parts[name] = rows_version(side)
                metrics = {
                    "train_rows": len(train),
                    "rehearsal_rows": len(rehearsal),
                    "validation_rows": len(validation),
                    "heldout_rows": len(heldout),
                    "retention_rows": len(rows["retention"]),
                    "preference_pairs": len(pairs),
                    "train_rows_removed": removed,
                    "pairs_removed": len(rows["preferences"]) - len(pairs),
                }
                return StepResult(metrics, parts)

            artifact, reused = workshop.materialize(
                context,
                settings={
                    "share": data.heldout_share,
                    "validation_share": data.validation_share,
                    "salt": data.split_salt,
                    "fixed": bool(data.heldout),
                },
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
        text = (
            f"{found[0][0]} {found[0][1]} and {found[0][2]} {found[0][3]} share their prompt ({len(found)} in all)"
            if found
            else "no prompt stands on two sides"
        )
        return dg.AssetCheckResult(passed=not found, description=text, metadata={"overlaps": len(found)})

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

    @dg.asset(
        partitions_def=base_models,
        deps=[base_model, recipe, heldout_split],
        group_name="training",
        owners=OWNERS,
        kinds={"pytorch"},
        code_version="2",
        pool=GPU_POOL,
    )
    def lora_adapter(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """SFT adapter: LoRA (or QLoRA) trained on the assistant's answers only."""
        store, name = workshop.store, context.partition_key
        with user_errors():
            chosen = workshop.project.recipe(name)
            artifact, reused = workshop.materialize(
                context,
                settings={"lora": chosen.lora.model_dump(mode="json"), "sft": chosen.sft.model_dump(mode="json")},
                inputs={
                    "base_model": (store.need("base_model", name), None),
                    **{f"heldout_split#{part}": (store.need("heldout_split", name), part) for part in ("train", "validation")},
                },
                step="sft",
                libraries="train",
                space=500_000_000,
            )
        return result(artifact, reused, **_curve(artifact, "SFT loss"))

    @dg.asset_check(asset=lora_adapter, partitions_def=base_models, description="The loss fell and the adapter is not zero.")
    def something_was_learnt(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Warn if the loss of the last steps is not below that of the first."""
        metrics = workshop.store.need("lora_adapter", context.partition_key).metrics
        passed = metrics["loss_last"] < metrics["loss_first"] and metrics["largest_update"] > 0
        return dg.AssetCheckResult(
            passed=passed,
            severity=WARN,
            description=f"loss {metrics['loss_first']:.3f} → {metrics['loss_last']:.3f}, largest |B| {metrics['largest_update']:.2g}",
        )

    @dg.asset(
        partitions_def=base_models,
        deps=[base_model, recipe, heldout_split, lora_adapter],
        group_name="training",
        owners=OWNERS,
        kinds={"pytorch"},
        code_version="2",
        pool=GPU_POOL,
    )
    def dpo_adapter(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        """DPO on top of the SFT policy, with the SFT policy as the frozen reference. One adapter holds SFT + DPO."""
        store, name = workshop.store, context.partition_key
        with user_errors():
            chosen = workshop.project.recipe(name)
            artifact, reused = workshop.materialize(
                context,
                settings={"lora": chosen.lora.model_dump(mode="json"), "dpo": chosen.dpo.model_dump(mode="json")},
                inputs={
                    "base_model": (store.need("base_model", name), None),
                    "lora_adapter": (store.need("lora_adapter", name), None),
                    "heldout_split#preferences": (store.need("heldout_split", name), "preferences"),
                },
                step="dpo",
                libraries="train",
                space=500_000_000,
            )
        return result(artifact, reused, **_curve(artifact, "DPO loss"))

    @dg.asset_check(
        asset=dpo_adapter,
        blocking=True,
        partitions_def=base_models,
        description="Before the first step policy and reference agree: the reference is the SFT policy, not the base.",
    )
    def reference_is_the_sft_policy(context: dg.AssetCheckExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.AssetCheckResult:
        """Fail if their log-probabilities differed by more than a thousandth of a nat."""
        metrics = workshop.store.need("dpo_adapter", context.partition_key).metrics
        if metrics["pairs"] == 0:
            return dg.AssetCheckResult(passed=True, description="no preference data: no DPO")
        return dg.AssetCheckResult(
            passed=metrics["reference_difference"] <= 1e-3,
            description=f"largest difference before the first step: {metrics['reference_difference']:.2g} nats",
        )

    assets = [base_model, recipe, chat_dataset, heldout_split, lora_adapter, dpo_adapter]
    checks = [
        every_row_is_proven,
        few_rows_are_too_long,
        nothing_leaks,
        heldout_is_large_enough,
        something_was_learnt,
        reference_is_the_sft_policy,
    ]
    return assets, checks
