"""The artifact store for a person: its versions and their sizes. Nothing is changed here."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ft_assets.artifacts import Artifact, ArtifactStore


@dataclass(frozen=True)
class Version:
    """A published version; its folder is beside the CURRENT of its asset and partition."""

    artifact: Artifact

    @property
    def path(self) -> Path:
        return self.artifact.folder

    @property
    def home(self) -> Path:
        return self.path.parent

    @property
    def asset(self) -> str:
        return self.artifact.asset

    @property
    def partition(self) -> str | None:
        return self.artifact.manifest.partition

    @property
    def made(self) -> float:
        """Seconds since 1970."""
        return self.artifact.manifest.finished

    @property
    def where(self) -> str:
        return f"{self.asset}[{self.partition}]" if self.partition else self.asset


def versions(store: ArtifactStore) -> tuple[list[Version], list[str]]:
    """Return the versions of the store, and the folders with an unreadable manifest."""
    found, unreadable = store.versions()
    return [Version(artifact) for artifact in found], unreadable


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; vanished files count 0."""
    total = 0
    for place, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(Path(place) / name).st_size
            except OSError:
                continue
    return total if path.is_dir() else path.lstat().st_size if path.exists() else 0


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def in_bytes(count: float) -> str:
    """Return a size for a person: 12 B, 3.4 MB, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def in_utc(seconds: float) -> str:
    """Return a time as `2025-01-31 12:00`, UTC."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def columns(rows: list[list[str]]) -> list[str]:
    """Return rows as lines whose cells stand below each other."""
    wide = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip()
        for row in rows
    ]
