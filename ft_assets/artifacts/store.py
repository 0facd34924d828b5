"""The artifact store: content-addressed directories, published atomically, found by fingerprint.

`<store>/<asset>/<partition>/<fingerprint>/` holds the files and `manifest.json`; `CURRENT` beside
it names the version that readers get. A version is staged under `.tmp-…`, fsynced and renamed, so
a reader never sees half of one.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ft_assets.artifacts.manifest import MANIFEST, Artifact, Manifest, make_manifest
from ft_assets.errors import ArtifactError

UNPARTITIONED = "_"
STAGED = ".tmp-"  # the prefix of a version that is not published yet
TRASH = ".trash-"  # the prefix of a folder that is being deleted


class ArtifactStore:
    """Reads and publishes artifacts below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def _home(self, asset: str, partition: str | None) -> Path:
        return self.root / asset / (partition or UNPARTITIONED)

    def find(self, asset: str, partition: str | None, version: str) -> Artifact | None:
        """Return the version with this fingerprint if it was published whole, else None."""
        return self._read(self._home(asset, partition) / version)

    def current(self, asset: str, partition: str | None) -> Artifact | None:
        """Return the version that CURRENT names, or None."""
        name = self.current_name(asset, partition)
        return self.find(asset, partition, name) if name else None

    def current_name(self, asset: str, partition: str | None) -> str | None:
        """Return the fingerprint that CURRENT names, or None."""
        try:
            return (self._home(asset, partition) / "CURRENT").read_text().strip()
        except FileNotFoundError:
            return None

    def need(self, asset: str, partition: str | None) -> Artifact:
        """Return the current version. Raises ArtifactError that names what to materialize first."""
        artifact = self.current(asset, partition)
        if artifact is None:
            where = f"{asset}[{partition}]" if partition else asset
            raise ArtifactError(
                where=where,
                found="has not been materialized",
                expected="a published version",
                fix=f"materialize {where} first (ft run)",
            )
        return artifact

    def _read(self, path: Path) -> Artifact | None:
        try:
            return Artifact.read(path)
        except FileNotFoundError:
            return None

    def make_current(self, artifact: Artifact, partition: str | None) -> None:
        """Point CURRENT at an artifact, in one rename."""
        home = self._home(artifact.asset, partition)
        pointer = home / f".CURRENT-{uuid.uuid4().hex}"
        pointer.write_text(artifact.fingerprint + "\n")
        os.replace(pointer, home / "CURRENT")

    def checkpoints(self, asset: str, partition: str | None, version: str) -> Path:
        """Return the folder of checkpoints: by fingerprint, so only the same version resumes."""
        return self.root / ".work" / asset / (partition or UNPARTITIONED) / version

    def require_space(self, needed: int, what: str) -> None:
        """Raise ArtifactError if fewer than `needed` bytes are free below the store."""
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise ArtifactError(
                where=str(self.root),
                found=f"{free / 1e9:.2f} GB free",
                expected=f"{needed / 1e9:.2f} GB for {what}",
                fix="free some space, or set store: to another disk",
            )

    @contextmanager
    def staging(self, asset: str, partition: str | None) -> Iterator[Path]:
        """Yield an empty directory beside the versions; it is removed if it was not published."""
        home = self._home(asset, partition)
        path = home / f"{STAGED}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir(parents=True)
            yield path
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ArtifactError(
                    where=str(home),
                    found="the disk is full",
                    expected="free space",
                    fix="free some space, or set store: to another disk",
                ) from error
            raise
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(
        self,
        staged: Path,
        *,
        asset: str,
        partition: str | None,
        version: str,
        code_version: str,
        settings: Any,
        inputs: Mapping[str, str],
        environment: Mapping[str, str],
        metrics: Mapping[str, Any],
        parts: Mapping[str, str] | None = None,
        started: float,
    ) -> Artifact:
        """Publish a staged version durably, make it CURRENT, and return it.

        If another run has published the same version meanwhile, that version stays, because a
        reader may be using it.
        """
        manifest = make_manifest(
            staged,
            asset=asset,
            partition=partition,
            version=version,
            parts=parts,
            started=started,
            code_version=code_version,
            settings=settings,
            inputs=inputs,
            environment=environment,
            metrics=metrics,
        )
        artifact = self._commit(staged, manifest)
        self.make_current(artifact, partition)
        return artifact

    def _commit(self, staged: Path, manifest: Manifest) -> Artifact:
        (staged / MANIFEST).write_text(manifest.to_text())
        fsync_tree(staged)
        final = self._home(manifest.asset, manifest.partition) / manifest.fingerprint
        try:
            os.rename(staged, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (known := self._read(final)) is not None:
                return known
            replace(staged, final)  # a folder without a manifest is damaged
        fsync(final.parent)
        return Artifact(final, manifest)

    def versions(self, *below: str) -> tuple[list[Artifact], list[str]]:
        """Return all versions, and the folders with an unreadable manifest.

        `below` limits them to an asset, or to a partition of it.
        """
        found, unreadable = list[Artifact](), list[str]()
        for folder in _folders_with_manifest(self.root.joinpath(*below)):
            try:
                found.append(Artifact.read(folder))
            except (OSError, ValueError, ArtifactError):
                unreadable.append(str(folder))
        return found, unreadable

    def bytes_of(self, artifact: Artifact) -> int:
        """Return the size of a version in bytes."""
        return sum(path.lstat().st_size for path in artifact.folder.rglob("*") if path.is_file())

    def remove(self, artifact: Artifact) -> bool:
        """Delete a version. Return False if it became current, or another process deletes it.

        It is renamed before it is deleted: a reader finds it whole or not at all. Raises OSError.
        """
        home, name, partition = artifact.folder.parent, artifact.fingerprint, artifact.partition
        if self.current_name(artifact.asset, partition) == name:
            return False
        trash = home / f"{TRASH}{uuid.uuid4().hex}"
        try:
            os.rename(artifact.folder, trash)
        except FileNotFoundError:
            return False
        if (
            self.current_name(artifact.asset, partition) == name
        ):  # a run went back to it between the two steps
            os.rename(trash, artifact.folder)
            return False
        shutil.rmtree(trash)
        return True


def replace(made: Path, folder: Path) -> None:
    """Move a folder to a path and replace what is there. A reader finds either one whole."""
    if folder.exists():
        trash = folder.parent / f"{TRASH}{uuid.uuid4().hex}"
        os.rename(folder, trash)
        os.rename(made, folder)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        os.rename(made, folder)


def _folders_with_manifest(root: Path) -> Iterator[Path]:
    """Yield the folders with a manifest. Names with a leading dot are work and leftovers."""
    for place, folders, files in os.walk(root):
        if MANIFEST in files:
            folders.clear()
            yield Path(place)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def fsync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(root: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for path in root.rglob("*"):
        fsync(path)
    fsync(root)
