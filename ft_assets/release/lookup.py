"""Find the artifacts of a released model again: the champion of months ago is a version in the store like any other."""

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.errors import ReleaseError
from ft_assets.release.champion import Model, state_of


def find_model(store: ArtifactStore, partition: str, model: Model) -> Artifact | None:
    """Return the merged model that a release names: by fingerprint, else another version with the same content."""
    found = store.find("merged_model", partition, model["merged_model"])
    return found or by_content(store, "merged_model", partition, model["data_version"])


def by_content(
    store: ArtifactStore, asset: str, partition: str, data_version: str
) -> Artifact | None:
    """Return a version of an asset with this content, or None; of an object store also one that this machine never read."""
    found, _ = store.versions(asset, partition)
    return next((artifact for artifact in found if artifact.data_version == data_version), None)


def need_champion(store: ArtifactStore, partition: str, where: str) -> tuple[Artifact, Artifact]:
    """Return (the release, the merged model that it releases). Raises ReleaseError if nothing is released or it is gone."""
    release = store.current("release", partition)
    if release is None:
        raise ReleaseError(
            where=where,
            found="nothing is released: no model of this base has passed the gate and been promoted",
            expected="a release",
            fix=f"ft run --base {partition}; if it stops, ft report says why",
        )
    champion = state_of(release).champion
    assert champion is not None, "a release has a champion"
    return release, need_model(store, partition, champion, where)


def need_model(store: ArtifactStore, partition: str, model: Model, where: str) -> Artifact:
    """Return a released merged model. Raises ReleaseError if the store has it no more."""
    found = find_model(store, partition, model)
    if found is None:
        raise ReleaseError(
            where=where,
            found=f"the merged model {model['merged_model']} is not in the store any more",
            expected="its folder below merged_model/",
            fix="restore it from a backup, or roll back to another champion",
        )
    return found


def need_adapter(store: ArtifactStore, partition: str, merged: Artifact, where: str) -> Artifact:
    """Return the adapter that a champion was made from: it holds the list of the rows that it was trained on. Raises
    ReleaseError if the store has it no more: a champion that is asked rows it was trained on looks better than it is."""
    found = adapter_of(store, partition, merged)
    if found is None:
        raise ReleaseError(
            where=where,
            found=f"the adapter that the champion {merged.fingerprint} was made from is not in the store any more, so nobody knows "
            "which rows it was trained on",
            expected="its folder below lora_adapter/ or dpo_adapter/",
            fix=f"restore it from a backup; or remove release/{partition} from the store: a new history then begins with today's model",
        )
    return found


def champion_since(release: Artifact) -> str:
    """Return which decision made the champion the champion, its number and time: a later one that keeps it changes nothing,
    and a model that is rolled back to is champion since the rollback."""
    history = state_of(release).history
    before = [
        index
        for index, line in enumerate(history)
        if line["champion"]["identity"] != history[-1]["champion"]["identity"]
    ]
    first = history[before[-1] + 1 if before else 0]
    return f"{first['sequence']} at {first['at']}"


def adapter_of(store: ArtifactStore, partition: str, merged: Artifact) -> Artifact | None:
    """Return the adapter that a merged model was made from, None if the store has it no more."""
    version = merged.manifest.inputs["adapter"]
    found = (
        by_content(store, asset, partition, version) for asset in ("lora_adapter", "dpo_adapter")
    )
    return next((artifact for artifact in found if artifact is not None), None)
