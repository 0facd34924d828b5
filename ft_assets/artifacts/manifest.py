"""What is known of a published version: its manifest, its identity before it is made, its bytes after.

`fingerprint` names a version by all that decides its content. The data version is the hash of the named parts if there are
any (sets of rows, whose order and file names do not count), else of all files but those under `info/` (logs, timings,
pictures): a rerun that ends in the same content has the same data version.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_assets.errors import ArtifactError

INFO = "info"


@dataclass(frozen=True)
class Artifact:
    """A published version: where its files lie on this machine, and what its manifest says."""

    folder: Path
    manifest: Mapping[str, Any]
    fetch: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    @property
    def path(self) -> Path:
        """The folder with its files; those of an object store are fetched when this is first read."""
        if self.fetch is not None:
            self.fetch()
        return self.folder

    @property
    def asset(self) -> str:
        return self.manifest["asset"]

    @property
    def partition(self) -> str | None:
        return self.manifest["partition"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def data_version(self) -> str:
        return self.manifest["data_version"]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest["metrics"]

    def part_version(self, part: str | None = None) -> str:
        """Return the version of a named part of the content (e.g. `train` of a split), or of the whole; "" of a part that the
        version of ft_assets which made it did not know."""
        return self.data_version if part is None else self.manifest["parts"].get(part, "")


def fingerprint(
    asset: str,
    code_version: str,
    settings: Any,
    inputs: Mapping[str, str],
    environment: Mapping[str, str],
) -> str:
    """Return the identity of a materialization before it is made: a hash of all that decides its content."""
    text = json.dumps(
        [asset, code_version, settings, dict(inputs), dict(environment)],
        sort_keys=True,
        ensure_ascii=False,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_manifest(
    staged: Path,
    *,
    asset: str,
    partition: str | None,
    version: str,
    parts: Mapping[str, str] | None,
    started: float,
    **told: Any,
) -> dict[str, Any]:
    """Return the manifest of the files in a staging folder; `told` is what the caller says of it (settings, inputs, metrics, …)."""
    files = {}
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            files[path.relative_to(staged).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
    content = (
        dict(parts)
        if parts
        else {
            name: entry["sha256"]
            for name, entry in files.items()
            if not name.startswith(f"{INFO}/")
        }
    )
    return {
        "asset": asset,
        "partition": partition,
        "fingerprint": version,
        "data_version": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[
            :20
        ],
        "parts": dict(parts or {}),
        **told,
        "files": files,
        "started": started,
        "finished": time.time(),
    }


def to_text(manifest: Mapping[str, Any]) -> str:
    """Return the manifest as it is stored."""
    return json.dumps(manifest, indent=1, ensure_ascii=False)


def verify_files(artifact: Artifact) -> None:
    """Raise ArtifactError naming the first file whose bytes are not those of the manifest."""
    for name, entry in artifact.manifest["files"].items():
        path = artifact.path / name
        if not path.is_file():
            raise ArtifactError(
                where=str(path),
                found="is missing",
                expected="the file of the manifest",
                fix=f"delete {artifact.path} and materialize {artifact.asset} again",
            )
        if file_sha256(path) != entry["sha256"]:
            raise ArtifactError(
                where=str(path),
                found="was changed after it was published",
                expected=f"sha256 {entry['sha256'][:12]}…",
                fix=f"delete {artifact.path} and materialize {artifact.asset} again",
            )
