"""The store on an object file system (s3://, gs://), with a local cache for its readers.

An object store cannot rename. So a version's files are uploaded first, under a name that no other
writer uses. Its manifest, which holds that name, is uploaded last: it is the commit mark, and half
an upload does not exist for a reader. CURRENT is one object, replaced whole.

A version is fetched once, by fingerprint, and checked against the SHA-256 of its manifest. One that
could not be uploaded waits in the cache, and is uploaded on the next request for it.
Credentials come from the environment.
"""

import contextlib
import functools
import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.artifacts.disk import fsync_tree, replace
from ft_assets.artifacts.documents import parse_document
from ft_assets.artifacts.manifest import MANIFEST, Artifact, Manifest, file_sha256
from ft_assets.artifacts.store import UNPARTITIONED, ArtifactStore
from ft_assets.artifacts.verification import Damage, manifest_damages, place_damages
from ft_assets.errors import ArtifactError, StoreUnreachable

WAITING = ".waiting-"  # made, but not yet sent
REFUSED = frozenset(
    {
        "403",
        "401",
        "AccessDenied",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "Forbidden",
    }
)


class ObjectStore(ArtifactStore):
    """An ArtifactStore whose versions are at `url`; `root` is the cache of this machine."""

    lock_seconds = 3600.0  # a writer holds the lock while it uploads

    def __init__(self, url: str, cache: Path) -> None:
        super().__init__(cache)
        self.url = url.rstrip("/")

    @functools.cached_property
    def _place(self) -> Any:
        from upath import UPath

        with self._reached(self.url):
            return UPath(
                self.url, use_listings_cache=False, skip_instance_cache=True
            )  # another process, or run, may have written

    @functools.cached_property
    def _files(self) -> Any:
        return self._place.fs

    def _key(self, asset: str, partition: str | None, *names: str) -> str:
        return "/".join((self._place.path.rstrip("/"), asset, partition or UNPARTITIONED, *names))

    def require_space(self, needed: int, what: str) -> None:
        """Raise ArtifactError if the cache's disk is too full, or the bucket is not writable.

        This fails before hours of work, not after.
        """
        super().require_space(needed, what)
        with self._reached(self.url):
            self._files.pipe_file(f"{self._place.path.rstrip('/')}/.writable", b"")

    def find(self, asset: str, partition: str | None, version: str) -> Artifact | None:
        """Return the version if it was uploaded. Upload it first if it waits in the cache."""
        text = self._read_text(self._key(asset, partition, version, MANIFEST))
        if text is None:
            waiting = next(self._home(asset, partition).glob(f"{WAITING}{version}-*"), None)
            return self._send(waiting, (asset, partition, version)) if waiting else None
        where = f"{self.url}/{asset}/{partition or UNPARTITIONED}/{version}"
        fix = f"delete {where}"
        manifest = parse_document(f"{where}/{MANIFEST}", Manifest, text, fix)
        self._refuse_another(where, manifest, (asset, partition, version))
        return self._artifact(manifest)

    def _refuse_another(
        self, where: str, manifest: Manifest, home: tuple[str, str | None, str]
    ) -> None:
        """Raise ArtifactError if a manifest is not of this place: its files would be put there."""
        if (manifest.asset, manifest.partition, manifest.fingerprint) != home:
            asset, _, version = home
            raise ArtifactError(
                where=f"{where}/{MANIFEST}",
                found=f"describes {manifest.asset} {manifest.fingerprint}",
                expected=f"the manifest of {asset} {version}",
                fix=f"restore {where} from a backup, or delete it",
            )

    def damages(self, artifact: Artifact, hashes: ContentHashes) -> Iterator[Damage]:
        """Yield what is wrong with a version in the bucket.

        An object is read again only if its size, tag, or time changed. The copy on this machine
        counts no more than a cache: `verified` fetches a damaged one again.
        """
        manifest = artifact.manifest
        home = (manifest.asset, manifest.partition, manifest.fingerprint)
        where = f"{self._place.protocol}://{self._key(*home)}"
        at = f"{where}/{MANIFEST}"
        yield from place_damages(at, manifest.fingerprint, manifest.asset, manifest)
        yield from manifest_damages(at, manifest)
        for name, entry in manifest.files.items():
            key = self._key(*home, manifest.place or "", name)
            path, expected = f"{self._place.protocol}://{key}", f"sha256 {entry.sha256[:12]}…"
            with self._reached(path):
                try:
                    found = self._sha256(path, key, hashes)
                except FileNotFoundError:
                    yield Damage(path, "is missing", f"the file of the manifest, {expected}")
                    continue
            if found != entry.sha256:
                changed = f"was changed after it was published: sha256 {found[:12]}…"
                yield Damage(path, changed, expected)

    def reads(self, artifact: Artifact, hashes: ContentHashes) -> list[Callable[[], str]]:
        manifest = artifact.manifest
        home = (manifest.asset, manifest.partition, manifest.fingerprint, manifest.place or "")
        keys = [self._key(*home, name) for name in manifest.files]
        return [
            functools.partial(self._sha256, f"{self._place.protocol}://{key}", key, hashes)
            for key in keys
        ]

    def homes(self) -> set[tuple[str, str | None]]:
        with self._reached(self.url):
            keys = self._files.glob(f"{self._place.path.rstrip('/')}/*/*/CURRENT")
        return {(key.split("/")[-3], _partition(key.split("/")[-2])) for key in keys}

    def pointer(self, asset: str, partition: str | None) -> str:
        return f"{self._place.protocol}://{self._key(asset, partition, 'CURRENT')}"

    def _sha256(self, name: str, key: str, hashes: ContentHashes) -> str:
        """Return the hash of an object, from the cache if it did not change."""
        info = self._files.info(key)
        tags = [info.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime")]
        state = [int(info["size"]), *(str(tag) for tag in tags if tag is not None)]
        if (known := hashes.known(name, state)) is not None:
            return known
        with self._files.open(key, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        hashes.note(name, state, found, int(info["size"]), keep=len(state) > 1)
        return found

    def verified(self, artifact: Artifact) -> Artifact:
        """Return the version with a copy on this machine that is as it was published.

        A damaged copy is fetched again. Raises ArtifactError if the bucket's files are damaged.
        """
        wrong = None
        for again in (False, True):
            if again:
                shutil.rmtree(artifact.folder, ignore_errors=True)
            wrong = next(super().damages(artifact, self.hashes), None)
            self.hashes.save()
            if wrong is None:
                return artifact
        assert wrong is not None
        raise wrong.error(self.remedy(artifact))

    def discard(self, asset: str, partition: str | None, version: str) -> None:
        with self._reached(self.url), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._key(asset, partition, version, MANIFEST))
            self._files.rm(self._key(asset, partition, version), recursive=True)
        shutil.rmtree(self._home(asset, partition) / version, ignore_errors=True)

    def read_beside(self, asset: str, partition: str | None, name: str) -> bytes | None:
        return self._read_bytes(self._key(asset, partition, name))

    def write_beside(self, asset: str, partition: str | None, name: str, data: bytes) -> None:
        with self._reached(self.url):
            self._files.pipe_file(self._key(asset, partition, name), data)

    def claim(self, asset: str, partition: str | None, name: str, version: str) -> str:
        """Return the version that has this name first, by a put of an object that must be new.

        The lock of a machine does not bind the others. A server that does not know such puts keeps
        the last of two writers of one moment.
        """
        key = self._key(asset, partition, name)
        with self._reached(self.url):
            with contextlib.suppress(FileExistsError):
                self._files.pipe_file(key, version.encode(), mode="create")
            return (self._read_bytes(key) or b"").decode(errors="replace")

    def remove_beside(self, asset: str, partition: str | None, name: str) -> None:
        with self._reached(self.url), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._key(asset, partition, name))

    def _completed(self, staged: Path, manifest: Manifest) -> tuple[Path, Manifest]:
        # Two machines that make the same version must not mix their files.
        manifest = manifest.model_copy(update={"place": f"files-{uuid.uuid4().hex[:12]}"}).sealed()
        waiting = staged.parent / f"{WAITING}{manifest.fingerprint}-{manifest.place}"
        super()._completed(staged, manifest)
        replace(staged, waiting)  # before the network, which may be down
        return waiting, manifest

    def _commit(self, staged: Path, manifest: Manifest) -> Artifact:
        return self._send(staged, (manifest.asset, manifest.partition, manifest.fingerprint))

    def _send(self, waiting: Path, home: tuple[str, str | None, str]) -> Artifact:
        """Upload a waiting version. Two processes may upload the same folder or version at once."""
        try:
            manifest = Manifest.read(waiting)
            with self._reached(self.url):
                for name in manifest.files:
                    self._files.put_file(
                        str(waiting / name), self._key(*home, manifest.place or "", name)
                    )
        except FileNotFoundError:  # another process has uploaded and moved it
            if (text := self._read_text(self._key(*home, MANIFEST))) is None:
                raise
            return self._artifact(Manifest.model_validate_json(text))
        with self._reached(self.url):
            self._files.pipe_file(self._key(*home, MANIFEST), manifest.to_text().encode())
        artifact = self._artifact(manifest)
        if _holds(artifact.folder, manifest):  # somebody may be reading it
            shutil.rmtree(waiting, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                replace(waiting, artifact.folder)
        return artifact

    def _artifact(self, manifest: Manifest) -> Artifact:
        folder = self._home(manifest.asset, manifest.partition) / manifest.fingerprint
        return Artifact(folder, manifest, functools.partial(self._fetch, folder, manifest))

    def _fetch(self, folder: Path, manifest: Manifest) -> None:
        """Fetch this version into the cache. Raises ArtifactError for a changed object."""
        if _holds(folder, manifest):
            return
        super().require_space(
            manifest.bytes + 10_000_000,
            f"a copy of {manifest.asset}",
        )
        with self.staging(manifest.asset, manifest.partition) as staged:
            for name, entry in manifest.files.items():
                target = staged / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fetch_file(manifest, name, entry.sha256, target)
            (staged / MANIFEST).write_text(manifest.to_text())
            fsync_tree(staged)
            replace(staged, folder)

    def _fetch_file(self, manifest: Manifest, name: str, digest: str, target: Path) -> None:
        key = self._key(
            manifest.asset,
            manifest.partition,
            manifest.fingerprint,
            manifest.place or "",
            name,
        )
        where = f"{self._place.protocol}://{key}"
        version = where.rpartition(f"/{manifest.place}")[0]
        fix = f"delete {version} and materialize {manifest.asset} again"
        with self._reached(where):
            try:
                self._files.get_file(key, str(target))
            except FileNotFoundError:
                raise ArtifactError(
                    where=where, found="is missing", expected="the file of the manifest", fix=fix
                ) from None
        if file_sha256(target) != digest:
            raise ArtifactError(
                where=where,
                found="was changed after it was published",
                expected=f"sha256 {digest[:12]}…",
                fix=fix,
            )

    def _read_bytes(self, key: str) -> bytes | None:
        with self._reached(f"{self.url}: {key}"):
            try:
                return self._files.cat_file(key)
            except FileNotFoundError:
                return None

    def _read_text(self, key: str) -> str | None:
        data = self._read_bytes(key)
        return None if data is None else data.decode()

    def versions(self, *below: str) -> tuple[list[Artifact], list[str]]:
        with self._reached(self.url):
            keys = sorted(
                self._files.glob(
                    "/".join((self._place.path.rstrip("/"), *below, *"***"[len(below) :], MANIFEST))
                )
            )
        found, unreadable = list[Artifact](), list[str]()
        for key in keys:
            try:
                text = self._read_text(key) or ""
                manifest = Manifest.model_validate_json(text)
                asset, partition, version, _ = key.rsplit("/", 3)
                home = (asset.rpartition("/")[2], _partition(partition), version)
                self._refuse_another(key.rpartition("/")[0], manifest, home)
                found.append(self._artifact(manifest))
            except (ValueError, ArtifactError):
                unreadable.append(key)
        return found, unreadable

    def bytes_of(self, artifact: Artifact) -> int:
        return artifact.manifest.bytes

    def remove(self, artifact: Artifact) -> bool:
        """Delete a version: its manifest first, so that no reader finds half of it."""
        asset, partition, version = artifact.asset, artifact.partition, artifact.fingerprint
        if self.current_name(asset, partition) == version:
            return False
        with self._reached(self.url):
            try:
                self._files.rm_file(self._key(asset, partition, version, MANIFEST))
                if (
                    self.current_name(asset, partition) == version
                ):  # a run went back to it between the two steps
                    self._files.pipe_file(
                        self._key(asset, partition, version, MANIFEST),
                        artifact.manifest.to_text().encode(),
                    )
                    return False
                self._files.rm(self._key(asset, partition, version), recursive=True)
            except FileNotFoundError:
                return False
        shutil.rmtree(artifact.folder, ignore_errors=True)
        return True

    @contextmanager
    def _reached(self, where: str) -> Iterator[None]:
        """Turn an error of the store's client into an ArtifactError or StoreUnreachable."""
        try:
            yield
        except (ArtifactError, StoreUnreachable):
            raise
        except (
            FileNotFoundError
        ) as error:  # of an object, which its reader expects, or of the whole bucket
            if "bucket" in str(error).lower():
                raise ArtifactError(
                    where=where,
                    found="the bucket does not exist",
                    expected="a bucket that exists",
                    fix="create it, or correct store:",
                ) from None
            raise
        except ImportError as error:
            raise ArtifactError(
                where=where,
                found=f"cannot be read ({error})",
                expected="the extra `remote`",
                fix='pip install "ft_assets[remote]"',
            ) from None
        except Exception as error:  # each client has errors of its own, without a common root
            response: Any = getattr(error, "response", None) or getattr(
                error.__cause__, "response", None
            )
            code = (
                str(response.get("Error", {}).get("Code", ""))
                if isinstance(response, dict)
                else str(getattr(error, "code", ""))
            )
            if (
                isinstance(error, PermissionError)
                or code in REFUSED
                or "credential" in str(error).lower()
            ):
                raise ArtifactError(
                    where=where,
                    found=f"the store refuses: {error}",
                    expected="credentials in the environment, with rights to read and write",
                    fix="set them",
                ) from None
            raise StoreUnreachable(where, f"{type(error).__name__}: {error}") from error


def _partition(folder: str) -> str | None:
    return None if folder == UNPARTITIONED else folder


def _holds(folder: Path, manifest: Manifest) -> bool:
    """Return True if the folder is a whole copy of a version's files."""
    try:
        return Manifest.read(folder).files == manifest.files
    except (FileNotFoundError, ValueError, ArtifactError):
        return False
