"""The artifact store: content-addressed directories, published atomically, found by fingerprint.

`<store>/<asset>/<partition>/<fingerprint>/` holds the files and `manifest.json`; `CURRENT` beside it names the version
that readers get. A version is staged under `.tmp-…`, fsynced and renamed, so that nobody ever sees half of one.
The data version is the hash of the named parts if there are any (sets of rows, whose order and file names do not
count), else of all files but those under `info/` (logs, timings, pictures): a rerun that ends in the same content has
the same data version.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_assets.errors import ArtifactError

UNPARTITIONED = "_"
INFO = "info"


@dataclass(frozen=True)
class Artifact:
    """A published version: its directory and what its manifest says."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def asset(self) -> str:
        return self.manifest["asset"]

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
        """Return the version of a named part of the content (e.g. `train` of a split), or of the whole."""
        return self.data_version if part is None else self.manifest["parts"][part]


def fingerprint(asset: str, code_version: str, settings: Any, inputs: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """Return the identity of a materialization before it is made: a hash of all that decides its content."""
    text = json.dumps([asset, code_version, settings, dict(inputs), dict(environment)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        pointer = self._home(asset, partition) / "CURRENT"
        try:
            return self.find(asset, partition, pointer.read_text().strip())
        except FileNotFoundError:
            return None

    def need(self, asset: str, partition: str | None) -> Artifact:
        """Return the current version. Raises ArtifactError that names what to materialize first."""
        artifact = self.current(asset, partition)
        if artifact is None:
            where = f"{asset}[{partition}]" if partition else asset
            raise ArtifactError(where, "has not been materialized", "a published version", f"materialize {where} first (ft run)")
        return artifact

    def _read(self, path: Path) -> Artifact | None:
        try:
            return Artifact(path, json.loads((path / "manifest.json").read_text()))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise ArtifactError(str(path / "manifest.json"), f"is not JSON ({error})", "a manifest", f"delete {path}") from None

    def make_current(self, artifact: Artifact, partition: str | None) -> None:
        """Point CURRENT at an artifact, in one rename."""
        home = self._home(artifact.asset, partition)
        pointer = home / f".CURRENT-{uuid.uuid4().hex}"
        pointer.write_text(artifact.fingerprint + "\n")
        os.replace(pointer, home / "CURRENT")

    def checkpoints(self, asset: str, partition: str | None, version: str) -> Path:
        """Return where a step may keep checkpoints: by fingerprint, so that only the same version ever resumes."""
        return self.root / ".work" / asset / (partition or UNPARTITIONED) / version

    def require_space(self, needed: int, what: str) -> None:
        """Raise ArtifactError if fewer than `needed` bytes are free below the store."""
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise ArtifactError(
                str(self.root),
                f"{free / 1e9:.2f} GB free",
                f"{needed / 1e9:.2f} GB for {what}",
                "free some space, or set store: to another disk",
            )

    @contextmanager
    def staging(self, asset: str, partition: str | None) -> Iterator[Path]:
        """Yield an empty directory beside the versions; it is removed if it was not published."""
        home = self._home(asset, partition)
        path = home / f".tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir(parents=True)
            yield path
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ArtifactError(
                    str(home), "the disk is full", "free space", "free some space, or set store: to another disk"
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
        """Write the manifest, fsync, rename into place and make it CURRENT. Returns the published artifact."""
        files = {}
        for path in sorted(staged.rglob("*")):
            if path.is_file():
                files[path.relative_to(staged).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        content = dict(parts) if parts else {name: entry["sha256"] for name, entry in files.items() if not name.startswith(f"{INFO}/")}
        data_version = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
        manifest = {
            "asset": asset,
            "partition": partition,
            "fingerprint": version,
            "data_version": data_version,
            "parts": dict(parts or {}),
            "code_version": code_version,
            "settings": settings,
            "inputs": dict(inputs),
            "environment": dict(environment),
            "metrics": dict(metrics),
            "files": files,
            "started": started,
            "finished": time.time(),
        }
        (staged / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
        _fsync_tree(staged)
        final = self._home(asset, partition) / version
        if final.exists():
            shutil.rmtree(final)  # forced rerun of the same version
        os.rename(staged, final)
        _fsync(final.parent)
        artifact = Artifact(final, manifest)
        self.make_current(artifact, partition)
        return artifact


def verify_files(artifact: Artifact) -> None:
    """Raise ArtifactError naming the first file whose bytes are not those of the manifest."""
    for name, entry in artifact.manifest["files"].items():
        path = artifact.path / name
        if not path.is_file():
            raise ArtifactError(
                str(path), "is missing", "the file of the manifest", f"delete {artifact.path} and materialize {artifact.asset} again"
            )
        if file_sha256(path) != entry["sha256"]:
            raise ArtifactError(
                str(path),
                "was changed after it was published",
                f"sha256 {entry['sha256'][:12]}…",
                f"delete {artifact.path} and materialize {artifact.asset} again",
            )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        _fsync(path)
    _fsync(root)
