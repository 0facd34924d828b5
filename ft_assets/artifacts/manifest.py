"""The manifest of a published version, and the two hashes that identify it.

`fingerprint` identifies a version before it is made, by everything that decides its content. The
data version identifies its content: it is the hash of the named parts if there are any (sets of
rows, whose order and file names do not count), and otherwise of all files outside `info/` (logs,
timings, pictures). A rerun with the same content has the same data version.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ft_assets.artifacts.documents import parse_document
from ft_assets.errors import ArtifactError

MANIFEST = "manifest.json"
INFO = "info"


class FileEntry(BaseModel, frozen=True):
    """Size and SHA-256 of a published file."""

    bytes: int
    sha256: str


class Manifest(BaseModel, frozen=True):
    """The description of a published version, stored beside its files as manifest.json.

    The order of the fields is that of the file. `settings` and `metrics` are those of the asset.
    """

    asset: str
    partition: str | None
    fingerprint: str
    data_version: str
    parts: dict[str, str]  # name -> version
    code_version: str
    settings: Any  # plain data
    inputs: dict[str, str]  # name -> data version
    environment: dict[str, str]  # library -> version
    metrics: dict[str, Any]
    files: dict[str, FileEntry]  # by path below the folder
    started: float  # seconds since 1970
    finished: float
    place: str | None = None  # an object store's folder with the files

    @property
    def seconds(self) -> float:
        """The time that it took to make the version."""
        return self.finished - self.started

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(entry.bytes for entry in self.files.values())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder. Raises ArtifactError, FileNotFoundError."""
        path = folder / MANIFEST
        return parse_document(str(path), cls, path.read_text(), f"delete {folder}")

    def to_text(self) -> str:
        """Return the text of manifest.json."""
        exclude = {"place"} if self.place is None else None
        return json.dumps(self.model_dump(exclude=exclude), indent=1, ensure_ascii=False)


@dataclass(frozen=True)
class Artifact:
    """A published version: the folder of its files on this machine, and its manifest."""

    folder: Path
    manifest: Manifest
    fetch: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def read(cls, folder: Path) -> "Artifact":
        """Return the version in a folder. Raises ArtifactError, FileNotFoundError."""
        return cls(folder, Manifest.read(folder))

    @property
    def path(self) -> Path:
        """The folder with its files. Those of an object store are fetched on the first access."""
        if self.fetch is not None:
            self.fetch()
        return self.folder

    @property
    def asset(self) -> str:
        return self.manifest.asset

    @property
    def partition(self) -> str | None:
        return self.manifest.partition

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def data_version(self) -> str:
        return self.manifest.data_version

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest.metrics

    def part_version(self, part: str | None = None) -> str:
        """Return the version of a named part of the content (e.g. `train` of a split).

        Without a name, return the version of the whole. Return "" for a part that the version of
        ft_assets which made the artifact did not have.
        """
        return self.data_version if part is None else self.manifest.parts.get(part, "")


def fingerprint(
    asset: str,
    code_version: str,
    settings: Any,
    inputs: Mapping[str, str],
    environment: Mapping[str, str],
) -> str:
    """Return the identity of a version: a hash of everything that decides its content."""
    text = json.dumps(
        [asset, code_version, settings, dict(inputs), dict(environment)],
        sort_keys=True,
        ensure_ascii=False,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entries(staged: Path) -> dict[str, FileEntry]:
    """Return the entry of each file below a staging folder, sorted by path."""
    return {
        path.relative_to(staged).as_posix(): FileEntry(
            bytes=path.stat().st_size, sha256=file_sha256(path)
        )
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }


def content_version(files: Mapping[str, FileEntry], parts: Mapping[str, str] | None) -> str:
    """Return the data version of these files, or of these parts if there are any."""
    hashes = {
        name: entry.sha256 for name, entry in files.items() if INFO not in name.split("/")[:-1]
    }
    text = json.dumps(dict(parts) if parts else hashes, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def make_manifest(
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
    parts: Mapping[str, str] | None,
    started: float,
) -> Manifest:
    """Return the manifest of the files in a staging folder."""
    files = file_entries(staged)
    return Manifest(
        asset=asset,
        partition=partition,
        fingerprint=version,
        data_version=content_version(files, parts),
        parts=dict(parts or {}),
        code_version=code_version,
        settings=settings,
        inputs=dict(inputs),
        environment=dict(environment),
        metrics=dict(metrics),
        files=files,
        started=started,
        finished=time.time(),
    )


def verify_files(artifact: Artifact, sha256: Callable[[Path], str] = file_sha256) -> None:
    """Raise ArtifactError for the first file whose bytes are not those of the manifest.

    A manifest whose hashes do not give its data version was changed itself. The version of an
    artifact with parts is that of its rows, which the files' hashes do not give.
    sha256: the function that returns the hash of a file, e.g. from a cache.
    """
    manifest = artifact.manifest
    fix = f"delete {artifact.path} and materialize {artifact.asset} again"
    if not manifest.parts and content_version(manifest.files, None) != manifest.data_version:
        raise ArtifactError(
            where=str(artifact.folder / MANIFEST),
            found="was changed: its hashes do not give its data version",
            expected=f"files of version {manifest.data_version}",
            fix=fix,
        )
    for name, entry in manifest.files.items():
        path = artifact.path / name
        if not path.is_file():
            raise ArtifactError(
                where=str(path), found="is missing", expected="the file of the manifest", fix=fix
            )
        if sha256(path) != entry.sha256:
            raise ArtifactError(
                where=str(path),
                found="was changed after it was published",
                expected=f"sha256 {entry.sha256[:12]}…",
                fix=fix,
            )
