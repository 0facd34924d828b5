"""`store:` of finetune.yaml -> the store."""

from pathlib import Path
from typing import Protocol

from ft_assets.artifacts.object_store import ObjectStore
from ft_assets.artifacts.store import ArtifactStore


class Located(Protocol):
    """What a project says of its store: where this machine keeps files, and the URL of an object store if it is one."""

    @property
    def store_path(self) -> Path: ...

    @property
    def store_url(self) -> str | None: ...


def open_store(project: Located) -> ArtifactStore:
    """Return the project's store; nothing is connected or written before it is used."""
    return ObjectStore(project.store_url, project.store_path) if project.store_url else ArtifactStore(project.store_path)
