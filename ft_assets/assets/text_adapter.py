"""The asset `text_adapter`: continued pretraining on documents, before SFT."""

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.raw_text import has_text
from ft_assets.assets.training_curves import FIRST, loss_curve, overfitting_check
from ft_assets.errors import DataError
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import WARN, Materializer, result
from ft_assets.orchestration.memory_forecast import settle_method
from ft_assets.steps import text


def _summary(metrics: Metrics) -> str:
    shown = f"loss {metrics['loss_first']:.3f} → {metrics['loss_last']:.3f}"
    if "bits_per_byte_after" in metrics:
        before, after = (metrics[f"bits_per_byte_{when}"] for when in ("before", "after"))
        shown += f", {before:.3f} → {after:.3f} bits per byte"
    return shown


@asset(
    deps=["base_model", "recipe", "heldout_split", "text_dataset"],
    group="training",
    kinds=["pytorch"],
    code_version="1",
    gpu=True,
    summary=_summary,
    only_if=has_text,
)
def text_adapter(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Continued pretraining: the adapter (or all weights) on documents. SFT continues from it.

    The loss is on each token of a document.
    """
    store, name = materializer.store, context.partition_key
    chosen, seeds = materializer.project.recipe(name), materializer.project.gate.seeds
    assert chosen.text is not None, "the project has data.text"
    base = store.need("base_model", name)
    split, documents = store.need("heldout_split", name), store.need("text_dataset", name)
    _require_usable(documents)
    lora = settle_method(materializer.project, base, split, name, documents)
    artifact, reused = materializer.materialize(
        context,
        identity={
            "lora": lora.model_dump(mode="json"),
            "text": chosen.text.decisive(),
            **({"seeds": seeds} if seeds > 1 else {}),
        },
        inputs={
            "base_model": (base, None),
            "heldout_split#retention": (split, "retention"),
            "text_dataset": (documents, None),
        },
        step=text.Settings(
            lora=lora,
            text=chosen.text,
            validation_bytes=documents.metrics["validation_bytes"],
            memory_limit_gb=materializer.project.memory_limit_gb,
            seeds=seeds,
        ),
        libraries="train",
        space=500_000_000 * seeds,
    )
    return result(artifact, reused, FIRST, **loss_curve(artifact, "Loss on documents"))


def _require_usable(documents: Artifact) -> None:
    """Raise DataError for documents that a check of another run has refused."""
    metrics = documents.metrics
    if metrics["refused"] or not metrics["train_documents"]:
        found = f"{metrics['refused']} documents could not be proven, "
        raise DataError(
            where="text_dataset",
            found=f"{found}{metrics['train_documents']} are left to train on",
            expected="documents that are all proven, and one or more to train on",
            fix="correct data.text: ft status --left-out names each document",
        )


@check(text_adapter, description="The loss on documents fell.")
def text_was_learnt(checked: Checked) -> dg.AssetCheckResult:
    """Warn unless the loss of the validation documents fell, or without them, that of training."""
    metrics = checked.metrics
    names = ("loss_first", "loss_last")
    if "validation_loss_after" in metrics:
        names = ("validation_loss_before", "validation_loss_after")
    first, last = (metrics[name] for name in names)
    what = "the validation documents" if names[0].startswith("validation") else "the documents"
    return dg.AssetCheckResult(
        passed=last < first,
        severity=WARN,
        description=f"loss of {what} {first:.3f} → {last:.3f} nats per token",
    )


@check(text_adapter, description="The loss on general prompts rose by at most the gate's margin.")
def general_prompts_are_kept(checked: Checked) -> dg.AssetCheckResult:
    """Warn if it rose by more than gate.max_retention_loss. The verdict measures it again."""
    metrics, most = checked.metrics, checked.project.gate.max_retention_loss
    if "general_loss_after" not in metrics:
        text = "not measured: it needs general prompts (data.retention) and validation documents"
        return dg.AssetCheckResult(passed=True, description=text)
    before, after = metrics["general_loss_before"], metrics["general_loss_after"]
    text = f"loss on general prompts {before:.3f} → {after:.3f} nats per token"
    passed = after - before <= most
    if not passed:
        text += f"; gate.max_retention_loss is {most:g}. Lower text.learning_rate, train fewer "
        text += "epochs, or rely on data.rehearsal in SFT"
    return dg.AssetCheckResult(passed=passed, severity=WARN, description=text)


@check(text_adapter, description="The validation loss fell as long as the training loss did.")
def no_overfitting(checked: Checked) -> dg.AssetCheckResult:
    """Warn if the training loss still falls while the validation loss is above its minimum."""
    return overfitting_check(checked.artifact)
