"""Assets of one base model that train: the SFT and the DPO adapter, and their checks."""

from typing import Any

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.raw_data import OWNERS
from ft_assets.evaluation.curves import overfitting
from ft_assets.evaluation.plots import curve_plot, data_uri, read_curve
from ft_assets.orchestration.materializer import GPU_POOL, WARN, Materializer, result, user_errors


def _curve(artifact: Artifact, title: str) -> dict[str, Any]:
    curve = read_curve(artifact.path, "curve")
    if not curve:
        return {}
    picture = curve_plot(curve, title, read_curve(artifact.path, "validation"))
    return {"loss_curve": dg.MetadataValue.md(f"![loss]({data_uri(picture)})")}


def _overfitting(artifact: Artifact) -> dg.AssetCheckResult:
    """Return the result of a check: a warning where training loss still falls and validation loss is above its lowest."""
    rise, text = overfitting(
        read_curve(artifact.path, "curve"), read_curve(artifact.path, "validation")
    )
    kept = (
        f"; kept: step {artifact.metrics['kept_step']}, {artifact.metrics['kept_why']}"
        if "kept_step" in artifact.metrics
        else ""
    )
    return dg.AssetCheckResult(passed=rise is None, severity=WARN, description=text + kept)


def training_assets(
    base_models: dg.PartitionsDefinition,
) -> tuple[list[dg.AssetsDefinition], list[dg.AssetChecksDefinition]]:
    """Return the assets and checks, partitioned by base model."""
    base_model, recipe, heldout_split = (
        dg.AssetKey(name) for name in ("base_model", "recipe", "heldout_split")
    )

    @dg.asset(
        partitions_def=base_models,
        deps=[base_model, recipe, heldout_split],
        group_name="training",
        owners=OWNERS,
        kinds={"pytorch"},
        code_version="5",
        pool=GPU_POOL,
    )
    def lora_adapter(
        context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.MaterializeResult:
        """SFT: an adapter (LoRA, QLoRA by the memory plan, …) or all weights, trained on the assistant's answers only."""
        store, name = materializer.store, context.partition_key
        with user_errors():
            chosen = materializer.project.recipe(name)
            artifact, reused = materializer.materialize(
                context,
                settings={
                    "lora": chosen.lora.model_dump(mode="json"),
                    "sft": chosen.sft.decisive(),
                },
                inputs={
                    "base_model": (store.need("base_model", name), None),
                    **{
                        f"heldout_split#{part}": (store.need("heldout_split", name), part)
                        for part in ("train", "validation")
                    },
                },
                step="sft",
                step_settings={
                    "sft": chosen.sft.model_dump(mode="json"),
                    "memory_limit_gb": materializer.project.memory_limit_gb,
                },
                libraries="train",
                space=500_000_000,
            )
            return result(artifact, reused, **_curve(artifact, "SFT loss"))

    @dg.asset_check(
        asset=lora_adapter,
        partitions_def=base_models,
        description="The loss fell and the adapter is not zero.",
    )
    @user_errors()
    def something_was_learnt(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Warn if the loss of the last steps is not below that of the first."""
        metrics = materializer.store.need("lora_adapter", context.partition_key).metrics
        passed = metrics["loss_last"] < metrics["loss_first"] and metrics["largest_update"] > 0
        return dg.AssetCheckResult(
            passed=passed,
            severity=WARN,
            description=f"loss {metrics['loss_first']:.3f} → {metrics['loss_last']:.3f}, largest update {metrics['largest_update']:.2g}",
        )

    @dg.asset_check(
        asset=lora_adapter,
        partitions_def=base_models,
        description="The validation loss fell as long as the training loss did.",
    )
    @user_errors()
    def no_overfitting(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Warn if the curves part: training loss still falling, validation loss above its lowest."""
        return _overfitting(materializer.store.need("lora_adapter", context.partition_key))

    @dg.asset(
        partitions_def=base_models,
        deps=[base_model, recipe, heldout_split, lora_adapter],
        group_name="training",
        owners=OWNERS,
        kinds={"pytorch"},
        code_version="5",
        pool=GPU_POOL,
    )
    def dpo_adapter(
        context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.MaterializeResult:
        """DPO on top of the SFT policy, with the SFT policy as the frozen reference. One adapter holds SFT + DPO."""
        store, name = materializer.store, context.partition_key
        with user_errors():
            chosen = materializer.project.recipe(name)
            artifact, reused = materializer.materialize(
                context,
                settings={
                    "lora": chosen.lora.model_dump(mode="json"),
                    "dpo": chosen.dpo.decisive(),
                },
                inputs={
                    "base_model": (store.need("base_model", name), None),
                    "lora_adapter": (store.need("lora_adapter", name), None),
                    **{
                        f"heldout_split#{part}": (store.need("heldout_split", name), part)
                        for part in ("preferences", "preferences_validation")
                    },
                },
                step="dpo",
                step_settings={
                    "dpo": chosen.dpo.model_dump(mode="json"),
                    "memory_limit_gb": materializer.project.memory_limit_gb,
                },
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
    @user_errors()
    def reference_is_the_sft_policy(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Fail if their log-probabilities differed by more than a thousandth of a nat."""
        metrics = materializer.store.need("dpo_adapter", context.partition_key).metrics
        if metrics["pairs"] == 0:
            return dg.AssetCheckResult(passed=True, description="no preference data: no DPO")
        return dg.AssetCheckResult(
            passed=metrics["reference_difference"] <= 1e-3,
            description=f"largest difference before the first step: {metrics['reference_difference']:.2g} nats",
        )

    @dg.asset_check(
        asset=dpo_adapter,
        name="no_overfitting",
        partitions_def=base_models,
        description="The validation loss of the pairs fell as long as the training loss did.",
    )
    def no_overfitting_of_pairs(
        context: dg.AssetCheckExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.AssetCheckResult:
        """Warn if the curves part: training loss still falling, validation loss above its lowest."""
        return _overfitting(materializer.store.need("dpo_adapter", context.partition_key))

    return [lora_adapter, dpo_adapter], [
        something_was_learnt,
        no_overfitting,
        reference_is_the_sft_policy,
        no_overfitting_of_pairs,
    ]
