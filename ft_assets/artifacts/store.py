"""The artifact store: content-addressed directories, published atomically, found by fingerprint.

`<store>/<asset>/<partition>/<fingerprint>/` holds the files and `manifest.json`; `CURRENT` beside
it names the version that readers get. A version is staged under `.tmp-…`, fsynced and renamed, so
a reader never sees half of one. Readers take no lock. Writers of one asset and partition take turns
(`lock`).
"""

import contextlib
import functools
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.artifacts.disk import (
    OCCUPIED,
    STAGED,
    TRASH,
    fsync,
    fsync_tree,
    full_disk_named,
    replace,
    write_durably,
)
from ft_assets.artifacts.manifest import (
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    Read,
    make_manifest,
)
from ft_assets.artifacts.verification import UNPARTITIONED, Damage, damages, place_damages, remedy
from ft_assets.errors import ArtifactError, FtError, LeaseLost, StoreBusy

CURRENT = "CURRENT"
NAME = re.compile(rb"[0-9A-Za-z_-]{1,64}")  # of a version
NEXT = ".next"  # beside CURRENT: what is about to become it, after interrupted publications


def _nothing(_: object) -> None:
    return None


@dataclass(frozen=True)
class Turn:
    """What is done while a version becomes current and no other process writes.

    before: gets the fingerprint, and raises an error if the change must not be made. after: gets
    the version when it is in its place, just before CURRENT names it.
    """

    before: Callable[[str], object] = _nothing
    after: Callable[[Artifact], object] = _nothing


class ArtifactStore:
    """Reads and publishes artifacts below `root`."""

    lock_seconds = 60.0  # a writer holds the lock for a few renames

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @functools.cached_property
    def hashes(self) -> ContentHashes:
        """The hashes of the store's files, which are read again only if a file may have changed."""
        return ContentHashes(self.kept_hashes, write_every=5.0)

    @property
    def kept_hashes(self) -> Path:
        """The file that keeps the hashes."""
        return self.root / ".work" / "hashes.json"

    def damages(self, artifact: Artifact, hashes: ContentHashes) -> Iterator[Damage]:
        """Yield what is wrong with a version: with its place, its manifest and its files."""
        folder = artifact.folder
        where = str(folder / MANIFEST)
        yield from place_damages(where, folder.name, folder.parent.parent.name, artifact.manifest)
        yield from damages(artifact, hashes.of)

    def reads(self, artifact: Artifact, hashes: ContentHashes) -> list[Callable[[], str]]:
        """Return a function for each file of a version that reads it into the cache `hashes`."""
        return [partial(hashes.of, artifact.folder / name) for name in artifact.manifest.files]

    def homes(self) -> set[tuple[str, str | None]]:
        """Return the (asset, partition) of each CURRENT."""
        return {_home_of(path.parent) for path in self.root.glob("[!.]*/*/CURRENT")}

    def pointer(self, asset: str, partition: str | None) -> str:
        """Return the path or URL of CURRENT."""
        return str(self._home(asset, partition) / "CURRENT")

    def verified(self, artifact: Artifact) -> Artifact:
        """Return the version if it is as it was published. Raises ArtifactError if it is not.

        All that reads a version for a verdict, a merge, or a release calls this first. A change
        between this and the reading is not found.
        """
        try:
            for damage in self.damages(artifact, self.hashes):
                raise damage.error(self.remedy(artifact))
        finally:
            self.hashes.save()
        return artifact

    def remedy(self, artifact: Artifact) -> str:
        """Return the advice that heals a damaged version."""
        # A damaged manifest may name another place.
        named = None
        with contextlib.suppress(ArtifactError):  # CURRENT is damaged too
            named = self.current_name(*_home_of(artifact.folder.parent))
        return remedy(artifact.folder, named == artifact.folder.name)

    def discard(self, asset: str, partition: str | None, version: str) -> None:
        """Delete a damaged version, which is about to be replaced."""
        folder = self._home(asset, partition) / version
        trash = folder.parent / f"{TRASH}{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, trash)
            shutil.rmtree(trash, ignore_errors=True)

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
        """Return the fingerprint that CURRENT names, None without one. Raises ArtifactError."""
        data = self.read_beside(asset, partition, CURRENT)
        where = str(self._home(asset, partition) / CURRENT)
        return None if data is None else name_in(data, where, asset)

    def read_beside(self, asset: str, partition: str | None, name: str) -> bytes | None:
        """Return a small file beside the versions, None without it. Raises ArtifactError."""
        path = self._home(asset, partition) / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _damaged(str(path), f"cannot be read ({error.strerror})", asset) from None

    def write_beside(self, asset: str, partition: str | None, name: str, data: bytes) -> None:
        """Replace a small file beside the versions, durably and in one step."""
        home = self._home(asset, partition)
        with full_disk_named(home):
            write_durably(home / name, data)

    def claim(self, asset: str, partition: str | None, name: str, version: str) -> str:
        """Return the version that has this name first. Writers that take turns need no claim."""
        return version

    def remove_beside(self, asset: str, partition: str | None, name: str) -> None:
        """Delete a small file beside the versions, if it is there."""
        (self._home(asset, partition) / name).unlink(missing_ok=True)

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

    def make_current(
        self, artifact: Artifact, partition: str | None, turn: Turn | None = None
    ) -> None:
        """Point CURRENT at an artifact, durably and in one step.

        Raises ArtifactError, StoreBusy.
        """
        with contextlib.suppress(ArtifactError):  # a damaged pointer is replaced
            if self.current_name(artifact.asset, partition) == artifact.fingerprint:
                return
        turn = turn or Turn()
        with self.lock(artifact.asset, partition):
            turn.before(artifact.fingerprint)
            turn.after(artifact)
            self._point(artifact, partition)

    def _point(self, artifact: Artifact, partition: str | None) -> None:
        if self.find(artifact.asset, partition, artifact.fingerprint) is None:
            raise ArtifactError(
                where=str(artifact.folder),
                found="was removed a moment ago, by ft gc or a person",
                expected="the version that this step found",
                fix=f"materialize {artifact.asset} again",
            )
        name = f"{artifact.fingerprint}\n".encode()
        self.write_beside(artifact.asset, partition, CURRENT, name)

    @contextmanager
    def lock(self, asset: str, partition: str | None) -> Iterator[None]:
        """Wait for the other writers of an asset and partition, and keep them waiting.

        The kernel ends the lock with its process. Raises StoreBusy after `lock_seconds`.
        """
        from filelock import FileLock, Timeout

        path = self.root / ".work" / "locks" / asset / f"{partition or UNPARTITIONED}.lock"
        lock = FileLock(path)
        with full_disk_named(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=self.lock_seconds)
            except Timeout:
                raise StoreBusy(str(path), path.read_text().strip(), self.lock_seconds) from None
        try:
            with contextlib.suppress(OSError):  # e.g. a full disk; the name is for messages only
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
            yield
        finally:
            lock.release()

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
            with full_disk_named(home):
                path.mkdir(parents=True)
                yield path
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
        inputs_read: Mapping[str, Read] | None = None,
        turn: Turn | None = None,
        known: Mapping[str, FileEntry] | None = None,
    ) -> Artifact:
        """Publish a staged version durably, make it CURRENT, and return it.

        known: the entries of files that are hashed already.

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
            inputs_read=inputs_read,
            known=known,
        )
        staged, manifest = self._completed(staged, manifest)
        turn = turn or Turn()
        with self.lock(asset, partition):
            try:
                turn.before(version)
            except (FtError, LeaseLost):
                shutil.rmtree(staged, ignore_errors=True)  # nobody may publish it later
                raise
            is_history = turn.after is not _nothing
            if is_history:
                # If this process ends in between, NEXT tells that no pointer was lost.
                before = self.read_beside(asset, partition, NEXT) or b""
                self.write_beside(asset, partition, NEXT, before + f"{version}\n".encode())
            artifact = self._commit(staged, manifest)
            turn.after(artifact)
            self._point(artifact, partition)
            if is_history:
                self.remove_beside(asset, partition, NEXT)
        return artifact

    def _completed(self, staged: Path, manifest: Manifest) -> tuple[Path, Manifest]:
        """Write the manifest and wait for the disk; return where the version is now."""
        (staged / MANIFEST).write_text(manifest.to_text())
        fsync_tree(staged)
        return staged, manifest

    def _commit(self, staged: Path, manifest: Manifest) -> Artifact:
        final = self._home(manifest.asset, manifest.partition) / manifest.fingerprint
        try:
            os.rename(staged, final)
        except FileNotFoundError:
            # NFS: the server renamed it, but its first answer was lost.
            known = self._read(final)
            if known is None or known.manifest != manifest:
                raise
        except OSError as error:
            if error.errno not in OCCUPIED:
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
        trash = artifact.folder.parent / f"{TRASH}{uuid.uuid4().hex}"
        with self.lock(artifact.asset, artifact.partition):
            if self.current_name(artifact.asset, artifact.partition) == artifact.fingerprint:
                return False
            try:
                os.rename(artifact.folder, trash)
            except FileNotFoundError:
                return False
        shutil.rmtree(trash)
        return True


def name_in(data: bytes, where: str, asset: str) -> str:
    """Return the name in the bytes of a CURRENT. Raises ArtifactError."""
    name = data.strip()
    if NAME.fullmatch(name) is None:
        shown = f"holds {name[:20]!r}" if name else "is empty"
        raise _damaged(where, shown, asset)
    return name.decode()


def _damaged(where: str, found: str, asset: str) -> ArtifactError:
    again = f"delete it, and materialize {asset}: a version that the store has is found again"
    return ArtifactError(
        where=where,
        found=f"{found}: it names no version",
        expected="the fingerprint of a version",
        fix="ft release --repair" if asset == "release" else again,
    )


def _home_of(folder: Path) -> tuple[str, str | None]:
    """Return the asset and the partition of a folder with versions."""
    return folder.parent.name, None if folder.name == UNPARTITIONED else folder.name


def _folders_with_manifest(root: Path) -> Iterator[Path]:
    """Yield the folders with a manifest. Names with a leading dot are work and leftovers."""
    for place, folders, files in os.walk(root):
        if MANIFEST in files:
            folders.clear()
            yield Path(place)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
