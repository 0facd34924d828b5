"""The asset `dpo_adapter`: preference training (DPO or KTO) on top of the SFT adapter."""

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.assets.training_curves import FIRST, loss_curve, overfitting_check
from ft_assets.errors import ArtifactError
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import Materializer, result
from ft_assets.release.card_facts import continued
from ft_assets.steps import dpo

NO_PREFERENCES = "no preference pairs: no DPO"


def has_preferences(metrics: Metrics) -> bool:
    """Return True if a dpo_adapter was trained, and is not the SFT adapter."""
    return bool(metrics["pairs"] or metrics.get("labels"))


def _summary(metrics: Metrics) -> str:
    if not has_preferences(metrics):
        return NO_PREFERENCES
    loss = f"loss {metrics['loss_first']:.3f} → {metrics['loss_last']:.3f}"
    if labels := metrics.get("labels"):
        return f"KTO on {labels} labelled answers, {loss}"
    own = f", {metrics['pairs_sampled']} of them sampled" if "pairs_sampled" in metrics else ""
    return f"{metrics['pairs']} pairs{own}, {loss}"


@asset(
    deps=["base_model", "recipe", "heldout_split", "lora_adapter"],
    group="training",
    kinds=["pytorch"],
    code_version="6",
    gpu=True,
    also=lambda project: ["sampled_preferences"] if project.samples() else [],
    summary=_summary,
)
def dpo_adapter(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """DPO on top of the SFT policy, with the SFT policy as the frozen reference.

    Labelled answers without pairs are trained by KTO. One adapter holds SFT and DPO.
    """
    store, name = materializer.store, context.partition_key
    chosen, seeds = materializer.project.recipe(name), materializer.project.gate.seeds
    base = store.need("base_model", name)
    adapter = store.need("lora_adapter", name)
    split = store.need("heldout_split", name)
    tables = _tables(materializer, name, split, adapter)
    lora = continued(chosen.lora, adapter)
    artifact, reused = materializer.materialize(
        context,
        identity={
            "lora": lora.model_dump(mode="json"),
            "dpo": chosen.dpo.decisive(),
            **({"seeds": seeds} if seeds > 1 else {}),
        },
        inputs={
            "base_model": (base, None),
            "lora_adapter": (adapter, None),
            **{
                f"{made.asset}#{part}": (made, part)
                for made in tables
                for part in ("preferences", "preferences_validation")
            },
        },
        step=dpo.Settings(
            lora=lora,
            dpo=chosen.dpo,
            memory_limit_gb=materializer.project.memory_limit_gb,
            seeds=seeds,
        ),
        libraries="train",
        space=500_000_000 * seeds,
    )
    method = str(artifact.metrics.get("preference_method", "dpo")).upper()
    return result(artifact, reused, FIRST, **loss_curve(artifact, f"{method} loss"))


def _tables(
    materializer: Materializer, name: str, split: Artifact, adapter: Artifact
) -> list[Artifact]:
    """Return the artifacts whose pairs are trained on.

    Raises ArtifactError if the sampled pairs are of another SFT model.
    """
    source = materializer.project.recipe(name).dpo.pairs
    tables = [] if source == "sampled" else [split]
    if source == "given":
        return tables
    sampled = materializer.store.need("sampled_preferences", name)
    of = sampled.manifest.inputs.get("lora_adapter")
    if of != adapter.data_version:
        raise ArtifactError(
            where=f"sampled_preferences[{name}]",
            found=f"was sampled from another lora_adapter ({of}, now {adapter.data_version})",
            expected="answers of the SFT model that DPO starts from",
            fix="materialize sampled_preferences again (ft run)",
        )
    return [*tables, sampled]


@check(
    dpo_adapter,
    blocking=True,
    description="Before the first step policy and reference agree: the reference is the SFT "
    "policy, not the base.",
    fix="delete this version of dpo_adapter and train it again; if it fails again, report a fault",
)
def reference_is_the_sft_policy(checked: Checked) -> dg.AssetCheckResult:
    """Fail if their log-probabilities differ by more than a thousandth of a nat."""
    metrics = checked.metrics
    if not has_preferences(metrics):
        return dg.AssetCheckResult(passed=True, description=NO_PREFERENCES)
    difference = metrics["reference_difference"]
    return dg.AssetCheckResult(
        passed=difference <= 1e-3,
        description=f"largest difference before the first step: {difference:.2g} nats",
    )


@check(
    dpo_adapter,
    description="The validation loss of the pairs fell as long as the training loss did.",
)
def no_overfitting(checked: Checked) -> dg.AssetCheckResult:
    """Warn if the training loss still falls while the validation loss is above its minimum."""
    return overfitting_check(checked.artifact)
