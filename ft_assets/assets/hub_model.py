"""The asset `hub_model`: the champion on the hub. It is in the graph only if `release.push` names a repository."""

import dagster as dg

from ft_assets.assets.raw_data import OWNERS
from ft_assets.config import PushSettings
from ft_assets.orchestration.materializer import Materializer, result, user_errors
from ft_assets.release.lookup import champion_since, need_champion


def hub_assets(
    base_models: dg.PartitionsDefinition, push: PushSettings | None
) -> list[dg.AssetsDefinition]:
    """Return the asset, partitioned by base model; none without a repository."""
    if push is None:
        return []

    @dg.asset(
        partitions_def=base_models,
        deps=[dg.AssetKey("release")],
        group_name="release",
        owners=OWNERS,
        kinds={"huggingface"},
        code_version="2",
    )
    def hub_model(
        context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
    ) -> dg.MaterializeResult:
        """The champion in a hub repository, private by default. Pushed once each time a model becomes champion; HF_TOKEN's token."""
        name = context.partition_key
        with user_errors():
            released, champion = need_champion(materializer.store, name, f"hub_model[{name}]")
            chosen = {"repo": push.repo.replace("{base_model}", name), "private": push.private}
            artifact, reused = materializer.materialize(
                context,
                # A model that is rolled back to was pushed before, but the hub serves the one withdrawn.
                settings={"push": chosen, "champion_since": champion_since(released)},
                inputs={"release#champion": (released, "champion"), "champion": (champion, None)},
                step="push",
            )
            return result(artifact, reused)

    return [hub_model]
