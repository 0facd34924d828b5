"""Check a whole store: the bytes of every version, its pointers, checkpoints, and records.

A record is what a later artifact keeps of an earlier one: the version and the files of an input, or
the identity of a released model. A manifest that was changed together with its own hashes still
disagrees with the records.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.artifacts.checkpoint_files import checkpoints_below, damage
from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.artifacts.verification import (
    UNPARTITIONED,
    Damage,
    pointer_remedy,
    remedy,
)
from ft_assets.errors import ArtifactError
from ft_assets.release.records import disagreement, label, record_fix
from ft_assets.release.register import identity, state_of

MOST_THREADS = 8
Home = tuple[str, str | None]  # asset, partition


@dataclass(frozen=True)
class Finding:
    """Damage of one file or record.

    asset, partition: of the version. used_by: the current versions that depend on it. fix: what
    heals it.
    """

    asset: str
    partition: str | None
    damage: Damage
    fix: str
    used_by: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StoreCheck:
    """The outcome. read_bytes: of the files that were read now; the others did not change."""

    versions: list[Artifact]
    files: int
    bytes: int
    read_bytes: int
    findings: list[Finding]


def check_store(store: ArtifactStore, hashes: ContentHashes) -> StoreCheck:
    """Check a store. `hashes` decides which files are read again."""
    versions, unreadable = store.versions()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    reads = [read for artifact in versions for read in store.reads(artifact, hashes)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_read, reads))
    current = _current(store, versions)
    findings = [*_unreadable(store, unreadable), *_pointers(store, versions)]
    for artifact in versions:
        used_by = dependents(artifact, current)
        fix = store.remedy(artifact)
        findings += [
            Finding(artifact.asset, artifact.partition, found, fix, used_by)
            for found in store.damages(artifact, hashes)
        ]
    findings += [*records(versions, current), *_released(store, versions, current)]
    findings += _checkpoints(store.root, hashes)
    hashes.save()
    files = sum(len(artifact.manifest.files) for artifact in versions)
    size = sum(artifact.manifest.bytes for artifact in versions)
    return StoreCheck(versions, files, size, hashes.read_bytes, findings)


def _read(read: Callable[[], str]) -> None:
    """Fill the cache. What cannot be read is reported when its version is compared."""
    with contextlib.suppress(OSError, ArtifactError):
        read()


def _current(store: ArtifactStore, versions: Iterable[Artifact]) -> list[Artifact]:
    """Return the versions that readers get."""
    homes = {(artifact.asset, artifact.partition) for artifact in versions}
    names = {home: _name(store, home) for home in homes}
    return [one for one in versions if names[one.asset, one.partition] == one.fingerprint]


def _name(store: ArtifactStore, home: Home) -> str | None:
    """Return what CURRENT names, "" if it cannot be read."""
    try:
        return store.current_name(*home)
    except (ArtifactError, ValueError):
        return ""


def dependents(artifact: Artifact, current: Iterable[Artifact]) -> list[str]:
    """Return the current versions that were made from an artifact, directly or not."""
    current, found = list(current), dict[str, None]()
    waiting = [artifact]
    while waiting:
        source = waiting.pop()
        content = {source.data_version, *source.manifest.parts.values()}
        for one in current:
            name = label(one.asset, one.partition)
            if one is source or name in found or not content & set(one.manifest.inputs.values()):
                continue
            found[name] = None
            waiting.append(one)
    return list(found)


def _unreadable(store: ArtifactStore, folders: Iterable[str]) -> Iterator[Finding]:
    for folder in folders:
        place = Path(folder.removesuffix("/manifest.json"))
        asset, partition = place.parent.parent.name, place.parent.name
        home = (asset, None if partition == UNPARTITIONED else partition)
        fix = remedy(place, _name(store, home) == place.name)
        damage = Damage(f"{place}/manifest.json", "cannot be read", "a manifest of this place")
        yield Finding(*home, damage, fix)


def _pointers(store: ArtifactStore, versions: Iterable[Artifact]) -> Iterator[Finding]:
    """Yield the CURRENT pointers that name no version, and the versions without a pointer."""
    made = {(one.asset, one.partition, one.fingerprint) for one in versions}
    homes = store.homes() | {(one.asset, one.partition) for one in versions}
    for asset, partition in sorted(homes, key=str):
        where = store.pointer(asset, partition)
        name = _name(store, (asset, partition))
        if name is None:
            found = "is missing"
        elif (asset, partition, name) not in made:
            found = f"names {name[:24]!r}, which is no version" if name else "cannot be read"
        else:
            continue
        fix = pointer_remedy(asset, partition)
        yield Finding(asset, partition, Damage(where, found, "the name of a version"), fix)


def records(versions: Iterable[Artifact], current: Iterable[Artifact]) -> Iterator[Finding]:
    """Yield the versions that are not what a current later artifact read, once for each."""
    by_fingerprint = {one.fingerprint: one for one in versions}
    for later in current:
        told = set[str]()
        for name, read in later.manifest.inputs_read.items():
            found = by_fingerprint.get(read.fingerprint)
            if found is None or read.fingerprint in told:
                continue
            if (damage := disagreement(found, name, later)) is not None:
                told.add(read.fingerprint)
                names = [label(later.asset, later.partition)]
                yield Finding(found.asset, found.partition, damage, record_fix(found, later), names)


def _released(
    store: ArtifactStore, versions: Iterable[Artifact], current: Iterable[Artifact]
) -> Iterator[Finding]:
    """Yield the champions that the store does not have as they were released."""
    merged = [one for one in versions if one.asset == "merged_model"]
    for release in (one for one in current if one.asset == "release"):
        try:
            champion = state_of(release).champion
        except ArtifactError:  # a damaged file of it, which is found already
            continue
        if champion is None or any(identity(one) == champion.identity for one in merged):
            continue
        home = store.root / "merged_model" / str(release.partition) / champion.merged_model
        damage = Damage(
            str(home),
            "is not the model that was released, or is gone",
            f"the model with the identity {champion.identity[:12]}… of {release.folder.name}",
        )
        fix = f"restore {home} from a backup, or roll back to another champion"
        yield Finding(release.asset, release.partition, damage, fix)


def _checkpoints(root: Path, hashes: ContentHashes) -> Iterator[Finding]:
    for path in checkpoints_below(root):
        # A training may delete an older one meanwhile.
        if (wrong := damage(path, hashes.of)) is not None and path.exists():
            asset, partition = path.parents[2].name, path.parents[1].name
            fix = f"nothing: training resumes from the checkpoint before it; or delete {path}"
            found = Damage(str(path), wrong, "the files as they were written")
            yield Finding(asset, None if partition == UNPARTITIONED else partition, found, fix)
