"""`ft gc`: the removal of versions that are not needed any more.

Kept are, of every asset and partition: CURRENT, the newest few, what is younger than an hour; then
all that a kept version says it was made from, and what a running step reads. Without a readable
CURRENT, all versions are kept. A version is renamed first and deleted then: a reader finds it whole
or not at all.
"""

import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.artifacts.disk import TRASH
from ft_assets.commands.leftovers import leftovers, running_inputs
from ft_assets.commands.store_view import Version, columns, in_bytes, in_utc, size, versions
from ft_assets.errors import ArtifactError

YOUNG_SECONDS = 3600


@dataclass(frozen=True)
class Removal:
    """A version, or the leftover of a step, that can be removed."""

    path: Path
    what: str
    why: str
    made: float
    bytes: int
    artifact: Artifact | None  # the version; None for a leftover


def removals(
    store: ArtifactStore, keep: int, now: float | None = None
) -> tuple[list[Removal], list[str]]:
    """Return the removals, oldest first, and the kept folders with an unreadable manifest."""
    now = time.time() if now is None else now
    found, unreadable = versions(store)
    kept = kept_versions(store, found, keep, now, running_inputs(store.root, now))
    going = [
        Removal(
            version.path,
            f"{version.where} {version.path.name[:8]}",
            "an older version",
            version.made,
            store.bytes_of(version.artifact),
            version.artifact,
        )
        for version in found
        if version.path not in kept
    ]
    going += [
        Removal(old.path, old.what, old.why, old.touched, size(old.path), None)
        for old in leftovers(store.root, now)
    ]
    return sorted(
        going, key=lambda removal: (removal.artifact is None, removal.made, str(removal.path))
    ), unreadable


def kept_versions(
    store: ArtifactStore, found: list[Version], keep: int, now: float, in_use: Iterable[Path] = ()
) -> set[Path]:
    """Return the folders of the versions to keep."""
    homes: dict[Path, list[Version]] = defaultdict(list)
    for version in sorted(found, key=_newest_last, reverse=True):
        homes[version.home].append(version)
    current = {home: _current_name(store, its[0]) for home, its in homes.items()}
    used = {path.resolve() for path in in_use}
    waiting = [
        version
        for home, its in homes.items()
        for index, version in enumerate(its)
        if index < keep
        or current[home] in (version.path.name, None)
        or now - version.made < YOUNG_SECONDS
        or version.path.resolve() in used
    ]
    kept = {version.path: version for version in waiting}
    while waiting:
        for source in _sources(waiting.pop(), found, kept):
            kept[source.path] = source
            waiting.append(source)
    return set(kept)


def _newest_last(version: Version) -> tuple[int, float]:
    """Return the order of a version: decisions of a release by their number, not by a clock."""
    return int(version.artifact.metrics.get("sequence", 0)), version.made


def _current_name(store: ArtifactStore, version: Version) -> str | None:
    """Return the name of the current version beside this one; None if nothing names it."""
    try:
        current = store.current(version.asset, version.partition)
    except ArtifactError:
        return None
    return current.fingerprint if current else None


def _sources(version: Version, found: list[Version], kept: Mapping[Path, Version]) -> list[Version]:
    """Return the versions to keep because this version was made from them.

    One version that has all the parts it read is enough: an equal data version is equal content. A
    kept one will do, else it is the newest. Without this, a report (which reads the few-shot part
    of raw_dataset) would keep every raw_dataset.
    """
    assets = {other.asset for other in found}
    wanted: dict[tuple[str, str | None], list[tuple[str | None, str]]] = defaultdict(list)
    for name, data_version in version.artifact.manifest.inputs.items():
        whole, _, part = name.partition("#")
        asset, _, partition = whole.removesuffix("]").partition("[")
        # An input may have a name of its own (merged_model's `adapter`): then any asset that has
        # this content.
        wanted[asset, partition or None].append((part or None, data_version))
    needed = []
    for (name, partition), parts in wanted.items():
        asset = name if name in assets else None
        near = (partition,) if partition else (None, version.partition)
        matching = [
            other
            for other in found
            if other is not version  # a merge may have the very content that it was made from
            and asset in (None, other.asset)
            and other.partition in near
            and all(_has(other, part, content) for part, content in parts)
        ]
        if matching and not any(other.path in kept for other in matching):
            needed.append(max(matching, key=lambda other: other.made))
    return needed


def _has(version: Version, part: str | None, content: str) -> bool:
    manifest = version.artifact.manifest
    return (manifest.data_version if part is None else manifest.parts.get(part)) == content


def remove(store: ArtifactStore, removal: Removal) -> bool:
    """Delete it. Return False if it became current, or another process deletes it.

    Raises OSError if it cannot be deleted.
    """
    if removal.artifact is not None:
        return store.remove(removal.artifact)
    trash = removal.path.parent / f"{TRASH}{uuid.uuid4().hex}"
    try:
        os.rename(removal.path, trash)
        if not trash.is_dir():
            trash.unlink()
            return True
    except FileNotFoundError:
        return False
    shutil.rmtree(trash)
    return True


def table(going: list[Removal]) -> str:
    """Return the removals as text, with their sizes and the sum."""
    if not going:
        return "nothing to remove"
    rows = [
        [removal.what, in_utc(removal.made), in_bytes(removal.bytes), removal.why]
        for removal in going
    ]
    lines = columns([["what", "made (UTC)", "size", "why"], *rows])
    return "\n".join(
        [*lines, f"{len(going)} to remove, {in_bytes(sum(removal.bytes for removal in going))}"]
    )
