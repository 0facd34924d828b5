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
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, field_validator

from ft_assets.artifacts.documents import parse_document
from ft_assets.errors import ArtifactError

MANIFEST = "manifest.json"
INFO = "info"


class FileEntry(BaseModel, frozen=True):
    """Size and SHA-256 of a published file."""

    bytes: int
    sha256: str


class Read(BaseModel, frozen=True):
    """What a step read of an input: the fingerprint of its version, and the hash of its files.

    The data version of rows does not cover every byte of their files. `files` does.
    """

    fingerprint: str
    files: str


class Manifest(BaseModel, frozen=True):
    """The description of a published version, stored beside its files as manifest.json.

    The order of the fields is that of the file. `settings` and `metrics` are those of the asset.
    Manifests of older versions of ft_assets have neither `inputs_read` nor `seal`.
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
    inputs_read: dict[str, Read] = {}  # input -> the bytes that were read
    seal: str = ""  # SHA-256 of the other fields: a damaged number is found

    @field_validator("files")
    @classmethod
    def _stay_below_the_folder(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"the file {name} is outside the version's folder")
        return files

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
        fix = f"delete {folder}, and materialize the asset again"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ArtifactError(
                where=str(path),
                found=f"cannot be read ({error.strerror})",
                expected="the manifest of a version",
                fix=fix,
            ) from None
        return parse_document(str(path), cls, text, fix)

    def to_text(self) -> str:
        """Return the text of manifest.json."""
        later = ("place", "inputs_read", "seal")  # not in a manifest of an older version
        exclude = {name for name in later if not getattr(self, name)}
        return json.dumps(self.model_dump(exclude=exclude), indent=1, ensure_ascii=False)

    def sealed(self) -> "Manifest":
        """Return the manifest with the seal of its fields."""
        return self.model_copy(update={"seal": self.expected_seal})

    @property
    def expected_seal(self) -> str:
        """The SHA-256 of all fields but the seal and those that have their default."""
        text = json.dumps(self.model_dump(exclude={"seal"}, exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def files_version(self) -> str:
        """The hash of all files outside `info/`, also of an artifact with parts."""
        return content_version(self.files, None)


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


def file_entries(
    staged: Path, known: Mapping[str, FileEntry] | None = None
) -> dict[str, FileEntry]:
    """Return the entry of each file below a staging folder, sorted by path.

    known: entries of files that did not change since they were hashed.
    """
    paths = {
        path.relative_to(staged).as_posix(): path
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    return {
        name: (known or {}).get(name)
        or FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path))
        for name, path in paths.items()
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
    inputs_read: Mapping[str, Read] | None = None,
    known: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Return the manifest of the files in a staging folder. known: see `file_entries`."""
    files = file_entries(staged, known)
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
        inputs_read=dict(inputs_read or {}),
    ).sealed()
