"""Find the artifacts of a released model: former champions are versions in the store."""

import contextlib

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.config import ADAPTERS
from ft_assets.errors import ArtifactError, ReleaseError
from ft_assets.release.register import PROPOSED, ReleasedModel, identity, state_of
from ft_assets.release.whole_register import current_release


def find_model(store: ArtifactStore, partition: str, model: ReleasedModel) -> Artifact | None:
    """Find a merged model with the released content: by its fingerprint, else any version.

    One with a damaged manifest is not found: a rollback must be able to leave it.
    """
    found = None
    with contextlib.suppress(ArtifactError):
        found = store.find("merged_model", partition, model.merged_model)
    if found is not None and found.data_version == model.data_version:
        return found
    return by_content(store, "merged_model", partition, model.data_version)


def by_content(
    store: ArtifactStore, asset: str, partition: str, data_version: str
) -> Artifact | None:
    """Find a version of an asset by its content, None if there is none.

    An object store also has versions that this machine has never read.
    """
    found, _ = store.versions(asset, partition)
    return next((artifact for artifact in found if artifact.data_version == data_version), None)


def need_champion(store: ArtifactStore, partition: str, where: str) -> tuple[Artifact, Artifact]:
    """Return the release and its merged model. Raises ReleaseError if one of them is missing."""
    release = current_release(store, partition)
    if release is None:
        raise ReleaseError(
            where=where,
            found="nothing is released: no model of this base has passed the gate and been "
            "promoted",
            expected="a release",
            fix=f"ft run --base {partition}; if it stops, ft report shows the reason",
        )
    state = state_of(release)
    champion = state.champion
    if champion is None:
        last = state.history[-1]
        waits = last.decision == PROPOSED
        raise ReleaseError(
            where=where,
            found=f"nothing is released: merged_model {last.challenger.merged_model} "
            + ("awaits approval" if waits else f"was not approved: {last.reasons[0]}"),
            expected="a release that was approved",
            fix=f"ft release --base {partition} --approve {last.challenger.merged_model} "
            "--reason '…', or the page /ft/approval"
            if waits
            else "change what the reason names, and run again",
        )
    model = need_model(store, partition, champion, where)
    return release, model


def need_model(store: ArtifactStore, partition: str, model: ReleasedModel, where: str) -> Artifact:
    """Return a released merged model, by the content that the release recorded.

    Its files are not read: `store.verified` does that. Raises ReleaseError if the store has no
    model with this content.
    """
    found = find_model(store, partition, model)
    if found is not None and identity(found) == model.identity:
        return found
    if store.find("merged_model", partition, model.merged_model) is not None:
        raise ReleaseError(
            where=where,
            found=f"the manifest of merged_model {model.merged_model} has other files than the "
            "release recorded: the model was changed, or made again with another result",
            expected=f"a model with the identity {model.identity}",
            fix="restore it from a backup, or roll back to another champion",
        )
    if found is None:
        raise ReleaseError(
            where=where,
            found=f"the merged model {model.merged_model} is no longer in the store",
            expected="its folder below merged_model/",
            fix="restore it from a backup, or roll back to another champion",
        )
    return found


def need_adapter(store: ArtifactStore, partition: str, merged: Artifact, where: str) -> Artifact:
    """Return the adapter that a champion was made from; it lists its training rows.

    Raises ReleaseError if the store no longer has it: on rows it was trained on, a champion looks
    better than it is.
    """
    found = adapter_of(store, partition, merged)
    if found is None:
        raise ReleaseError(
            where=where,
            found=f"the adapter of the champion {merged.fingerprint} is no longer in the store, "
            "so its training rows are unknown",
            expected="its folder below lora_adapter/, dpo_adapter/ or rl_adapter/",
            fix=f"restore it from a backup; or remove release/{partition} from the store: a new "
            "history then begins with today's model",
        )
    return found


def champion_since(release: Artifact) -> str:
    """Return the number and the time of the decision that made the current champion.

    A later decision that keeps the champion changes nothing. A model that was rolled back to is
    champion since the rollback.
    """
    history = state_of(release).history
    first = history[-1]
    assert first.champion is not None, "there is a champion"
    current = first.champion.identity
    for line in reversed(history):
        if line.champion is None or line.champion.identity != current:
            break
        first = line
    return f"{first.sequence} at {first.at}"


def adapter_of(store: ArtifactStore, partition: str, merged: Artifact) -> Artifact | None:
    """Find the adapter that a merged model was made from, None if the store no longer has it."""
    version = merged.manifest.inputs["adapter"]
    found = (by_content(store, asset, partition, version) for asset in ADAPTERS.values())
    return next((artifact for artifact in found if artifact is not None), None)
