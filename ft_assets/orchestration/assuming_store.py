"""A store as it will be: a plan looks ahead with it and writes nothing."""

from collections.abc import Iterator
from pathlib import Path

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.artifacts.verification import Damage

# The versions that are read as current, and are not.
Assumed = frozenset[tuple[str, str | None, str]]


class AssumingStore(ArtifactStore):
    """Reads another store, and reads the versions that are assumed to be current as current."""

    def __init__(self, store: ArtifactStore) -> None:
        super().__init__(store.root)
        self._store = store
        self._assumed: dict[tuple[str, str | None], str] = {}
        # A plan asks for a version a dozen times.
        self._found: dict[tuple[str, str | None, str], Artifact | None] = {}
        self._verified: set[Path] = set()

    def assume(self, artifact: Artifact, partition: str | None) -> None:
        """Read this version as the current one from now on."""
        asset, version = artifact.asset, artifact.fingerprint
        if version != self.current_name(asset, partition):
            self._assumed[asset, partition] = version

    def assumed(self) -> Assumed:
        """Return the assumptions. Two stores with the same ones read the same."""
        return frozenset((*place, version) for place, version in self._assumed.items())

    def find(self, asset: str, partition: str | None, version: str) -> Artifact | None:
        place = (asset, partition, version)
        if place not in self._found:
            self._found[place] = self._store.find(*place)
        return self._found[place]

    def verified(self, artifact: Artifact) -> Artifact:
        if artifact.folder not in self._verified:
            self._store.verified(artifact)
            self._verified.add(artifact.folder)
        return artifact

    def damages(self, artifact: Artifact, hashes: ContentHashes) -> Iterator[Damage]:
        return self._store.damages(artifact, hashes)

    def current_name(self, asset: str, partition: str | None) -> str | None:
        assumed = self._assumed.get((asset, partition))
        return assumed or self._store.current_name(asset, partition)

    def versions(self, *below: str) -> tuple[list[Artifact], list[str]]:
        return self._store.versions(*below)

    def read_beside(self, asset: str, partition: str | None, name: str) -> bytes | None:
        return self._store.read_beside(asset, partition, name)
