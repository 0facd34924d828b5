"""The asset `lora_adapter`: supervised fine-tuning (SFT)."""

import dagster as dg

from ft_assets.assets.raw_text import has_text, text_stage
from ft_assets.assets.training_curves import FIRST, loss_curve, overfitting_check
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import WARN, Inputs, Materializer, result
from ft_assets.orchestration.memory_forecast import settle_method
from ft_assets.release.card_facts import continued
from ft_assets.steps import sft


def _summary(metrics: Metrics) -> str:
    loss = f"loss {metrics['loss_first']:.3f} → {metrics['loss_last']:.3f}"
    return f"{loss}, {metrics['train_rows']} rows"


@asset(
    deps=["base_model", "recipe", "heldout_split"],
    group="training",
    kinds=["pytorch"],
    code_version="5",
    gpu=True,
    summary=_summary,
    also=text_stage("text_adapter"),
)
def lora_adapter(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """SFT: an adapter (LoRA, QLoRA by the memory plan, …) or all weights.

    The loss is on the assistant's answers only. With data.text it continues the text_adapter.
    """
    store, name = materializer.store, context.partition_key
    chosen, seeds = materializer.project.recipe(name), materializer.project.gate.seeds
    base = store.need("base_model", name)
    split = store.need("heldout_split", name)
    before: Inputs = {}
    if has_text(materializer.project):
        text = store.need("text_adapter", name)
        before = {"text_adapter": (text, None)}
        lora = continued(chosen.lora, text)
    else:
        lora = settle_method(materializer.project, base, split, name)
    artifact, reused = materializer.materialize(
        context,
        identity={
            "lora": lora.model_dump(mode="json"),
            "sft": chosen.sft.decisive(),
            **({"seeds": seeds} if seeds > 1 else {}),
        },
        inputs={
            "base_model": (base, None),
            **before,
            **{f"heldout_split#{part}": (split, part) for part in ("train", "validation")},
        },
        step=sft.Settings(
            lora=lora,
            sft=chosen.sft,
            memory_limit_gb=materializer.project.memory_limit_gb,
            seeds=seeds,
        ),
        libraries="train",
        space=500_000_000 * seeds,
    )
    return result(artifact, reused, FIRST, **loss_curve(artifact, "SFT loss"))


@check(lora_adapter, description="The loss fell and the adapter is not zero.")
def something_was_learnt(checked: Checked) -> dg.AssetCheckResult:
    """Warn if the loss of the last steps is not below that of the first steps."""
    metrics = checked.metrics
    first, last, largest = (metrics[key] for key in ("loss_first", "loss_last", "largest_update"))
    return dg.AssetCheckResult(
        passed=last < first and largest > 0,
        severity=WARN,
        description=f"loss {first:.3f} → {last:.3f}, largest update {largest:.2g}",
    )


@check(lora_adapter, description="The validation loss fell as long as the training loss did.")
def no_overfitting(checked: Checked) -> dg.AssetCheckResult:
    """Warn if the training loss still falls while the validation loss is above its minimum."""
    return overfitting_check(checked.artifact)
