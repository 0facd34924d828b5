"""Published versions of the assets: what they are (manifest), where they lie (a folder, or an object store)."""

from ft_assets.artifacts.choose import open_store
from ft_assets.artifacts.manifest import Artifact, file_sha256, fingerprint, verify_files
from ft_assets.artifacts.object_store import ObjectStore
from ft_assets.artifacts.store import ArtifactStore

__all__ = ["Artifact", "ArtifactStore", "ObjectStore", "file_sha256", "fingerprint", "open_store", "verify_files"]
