"""The asset `hub_model`: the champion on the hub. A project has it if `release.push` is set."""

import dagster as dg

from ft_assets.config import Project
from ft_assets.orchestration.declarations import asset
from ft_assets.orchestration.materializer import Materializer, result
from ft_assets.release.lookup import champion_since
from ft_assets.release.signing import proven_release
from ft_assets.steps import push


def _is_pushed(project: Project) -> bool:
    return project.release.push is not None


@asset(
    deps=["release"], group="release", kinds=["huggingface"], code_version="2", only_if=_is_pushed
)
def hub_model(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The champion in a hub repository, private by default.

    It is pushed once each time a model becomes champion, with the token in HF_TOKEN. The signature
    of a signed release is pushed with it.
    """
    name, to = context.partition_key, materializer.project.release.push
    assert to is not None, "the graph has this asset only if release.push is set"
    where = f"hub_model[{name}]"
    proven = proven_release(materializer.project, materializer.store, name, where, weights=False)
    released, champion, signature = proven.released, proven.champion, proven.signature
    chosen = {"repo": to.repo.replace("{base_model}", name), "private": to.private}
    artifact, reused = materializer.materialize(
        context,
        # After a rollback the champion was pushed before, but the hub serves the withdrawn model.
        identity={
            "push": chosen,
            "champion_since": champion_since(released),
            **({"signed_with": signature.key.fingerprint} if signature else {}),
        },
        inputs={"release#champion": (released, "champion"), "champion": (champion, None)},
        step=push.Settings.model_validate(chosen),
    )
    return result(artifact, reused)
