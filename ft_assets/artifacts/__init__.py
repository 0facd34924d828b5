"""Published versions of the assets: their manifests, and the store that holds them."""

from pathlib import Path
from typing import Protocol

from ft_assets.artifacts.manifest import Artifact, file_sha256, fingerprint
from ft_assets.artifacts.object_store import ObjectStore
from ft_assets.artifacts.store import ArtifactStore
from ft_assets.artifacts.verification import verify_files

__all__ = [
    "Artifact",
    "ArtifactStore",
    "ObjectStore",
    "file_sha256",
    "fingerprint",
    "open_store",
    "verify_files",
]


class Located(Protocol):
    """The place of a store: a local path, and the URL of an object store if it uses one."""

    @property
    def store_path(self) -> Path: ...

    @property
    def store_url(self) -> str | None: ...


def open_store(project: Located) -> ArtifactStore:
    """Return the project's store. Nothing is connected or written before the store is used."""
    return (
        ObjectStore(project.store_url, project.store_path)
        if project.store_url
        else ArtifactStore(project.store_path)
    )
