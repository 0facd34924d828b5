"""The asset `rl_adapter`: reinforcement from the SFT model, by rewards of its own answers."""

import dagster as dg

from ft_assets.assets.judged import own_answer_scoring
from ft_assets.assets.own_rehearsal import own_rehearsal_of, own_rehearsal_stage
from ft_assets.config import Project, Recipe
from ft_assets.evaluation.plots import data_uri, read_curve, rl_plot
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import WARN, Materializer, result
from ft_assets.release.card_facts import continued
from ft_assets.steps import rl

FIRST = ("reward_first", "reward_last", "kl_last", "validation_loss")  # on the asset's page


def reinforces(project: Project) -> bool:
    """Return True if the project has the section `rl`."""
    return project.rl is not None


def rewards_of(recipe: Recipe) -> dict[str, float]:
    """Return the metrics that are rewards, with their weights; {} without RL."""
    if recipe.rl is None:
        return {}
    found = recipe.evaluation.rewards(recipe.rl.rewards)
    return {metric.name: weight for metric, weight in found.items()}


def _summary(metrics: Metrics) -> str:
    method = str(metrics["rl_method"]).upper()
    reward = f"reward {metrics['reward_first']:.3f} → {metrics['reward_last']:.3f}"
    return f"{method} on {metrics['prompts']} prompts, {reward}, KL {metrics['kl_last']:.3f}"


@asset(
    deps=["base_model", "recipe", "heldout_split", "raw_dataset", "lora_adapter"],
    group="training",
    kinds=["pytorch"],
    code_version="2",
    gpu=True,
    only_if=reinforces,
    summary=_summary,
    also=own_rehearsal_stage("own_rehearsal"),
)
def rl_adapter(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """GRPO or RLOO from the SFT policy, which is the reference of the KL divergence.

    The prompts are those of the training rows. Rewards are metrics of the evaluation. One adapter
    holds SFT and RL.
    """
    store, name, project = materializer.store, context.partition_key, materializer.project
    chosen, seeds = project.recipe(name), project.gate.seeds
    settings = chosen.rl
    assert settings is not None, "only_if"
    adapter = store.need("lora_adapter", name)
    lora = continued(chosen.lora, adapter)
    rewards = chosen.evaluation.rewards(settings.rewards)
    scoring = own_answer_scoring(materializer, name, rewards)
    artifact, reused = materializer.materialize(
        context,
        identity={
            "lora": lora.model_dump(mode="json"),
            "rl": {**settings.decisive(), "rewards": rewards_of(chosen)},
            **scoring,
            **({"seeds": seeds} if seeds > 1 else {}),
        },
        inputs={
            "base_model": (store.need("base_model", name), None),
            "lora_adapter": (adapter, None),
            **{
                f"heldout_split#{part}": (store.need("heldout_split", name), part)
                for part in ("train", "validation")
            },
            "raw_dataset#rehearsal": (store.need("raw_dataset", None), "rehearsal"),
            **own_rehearsal_of(materializer, name),
        },
        step=lambda: rl.Settings(
            lora=lora,
            rl=settings,
            evaluation=chosen.evaluation,
            answer_schema=scoring["schema"],
            root=project.root,
            memory_limit_gb=project.memory_limit_gb,
            seeds=seeds,
        ),
        libraries="train",
        space=500_000_000 * seeds,
    )
    picture = rl_plot(*(read_curve(artifact.path, file) for file in ("curve", "validation")))
    curves = dg.MetadataValue.md(f"![curves]({data_uri(picture)})")
    return result(artifact, reused, FIRST, curves=curves)


@check(
    rl_adapter,
    blocking=True,
    description="Before the first step policy and reference agree: the KL divergence is of the "
    "SFT policy.",
    fix="delete this version of rl_adapter and train it again; if it fails again, report a fault",
)
def rl_starts_at_the_sft_policy(checked: Checked) -> dg.AssetCheckResult:
    """Fail if log-probabilities differ by more than a thousandth of a nat, or the first KL by."""
    difference, kl = (checked.metrics[key] for key in ("reference_difference", "kl_first"))
    return dg.AssetCheckResult(
        passed=difference <= 1e-3 and abs(kl) <= 1e-3,
        description=f"before the first step: largest difference {difference:.2g} nats, "
        f"KL divergence {kl:.2g} nats a token",
    )


@check(
    rl_adapter,
    description="On validation rows the metric of the verdict did not fall while the reward rose.",
)
def reward_is_not_hacked(checked: Checked) -> dg.AssetCheckResult:
    """Warn if the reward of the validation answers rose while the verdict's metric fell.

    Over-optimization of a reward that is not the goal (Gao et al. 2023).
    """
    metric = checked.project.recipe(checked.name).evaluation.main_metric()
    curve = read_curve(checked.artifact.path, "validation")
    kept = next((entry for entry in curve if entry.get("kept")), None)
    key = f"validation_{metric.name}"
    if kept is None or key not in kept:
        text = f"{metric.name} was not measured on validation rows"
        return dg.AssetCheckResult(passed=True, description=text)
    before, after = curve[0][key], kept[key]  # with the sign of a reward: higher is better
    gain = curve[0]["validation_loss"] - kept["validation_loss"]
    tokens = f"{curve[0]['validation_tokens']:.0f} → {kept['validation_tokens']:.0f} tokens"
    return dg.AssetCheckResult(
        passed=not (gain > 0 and after < before),
        severity=WARN,
        description=f"reward {gain:+.3f}, {metric.name} {after - before:+.3f} on "
        f"{checked.metrics['validation_prompts']} validation rows, {tokens} an answer",
    )
