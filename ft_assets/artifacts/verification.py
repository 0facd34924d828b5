"""Compare a published version with its manifest, byte for byte, and the manifest with itself.

This finds any change of a file, a missing or an added file, a manifest whose hashes do not give its
data version or its fingerprint, a manifest whose seal is broken, and a version in the place of
another. It does not find a change after which all of these were computed again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ft_assets.artifacts.manifest import (
    MANIFEST,
    Artifact,
    Manifest,
    content_version,
    file_sha256,
    fingerprint,
)
from ft_assets.errors import ArtifactError

UNPARTITIONED = "_"  # the folder of an asset without partitions
Sha256 = Callable[[Path], str]
HISTORIES = frozenset({"release"})  # what no run can make again
SOURCES = frozenset(
    {"base_model", "raw_dataset", "raw_preferences", "raw_text"}
)  # of outside files


@dataclass(frozen=True)
class Damage:
    """One file that is not as it was published."""

    path: str
    found: str
    expected: str

    def error(self, fix: str) -> ArtifactError:
        """Return the damage as an error, with this advice."""
        return ArtifactError(where=self.path, found=self.found, expected=self.expected, fix=fix)


def verify_files(artifact: Artifact, sha256: Sha256 = file_sha256, fix: str = "") -> None:
    """Raise ArtifactError for the first file whose bytes are not those of the manifest.

    sha256: the function that returns the hash of a file, e.g. from a cache.
    """
    for damage in damages(artifact, sha256):
        raise damage.error(
            fix or f"delete {artifact.folder} and materialize {artifact.asset} again"
        )


def damages(artifact: Artifact, sha256: Sha256 = file_sha256) -> Iterator[Damage]:
    """Yield what is wrong with the files of a version on this machine, the manifest first."""
    manifest = artifact.manifest
    yield from manifest_damages(str(artifact.folder / MANIFEST), manifest)
    folder = artifact.path
    for name, entry in manifest.files.items():
        yield from _file_damage(folder / name, entry.bytes, entry.sha256, sha256)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in manifest.files or path.is_dir() or _is_ours(name):
            continue
        expected = "only the files of the manifest: a loader would read this one too"
        yield Damage(str(path), "was added after it was published", expected)


def manifest_damages(where: str, manifest: Manifest) -> Iterator[Damage]:
    """Yield the contradictions inside a manifest. `where`: its path or URL."""
    if content_version(manifest.files, manifest.parts) != manifest.data_version:
        found = "was changed: its hashes do not give its data version"
        yield Damage(where, found, f"files of version {manifest.data_version}")
    elif manifest.seal not in ("", manifest.expected_seal):
        yield Damage(where, "was changed: its seal is broken", f"seal {manifest.seal[:12]}…")


def place_damages(where: str, name: str, asset: str, manifest: Manifest) -> Iterator[Damage]:
    """Yield whether a folder holds another version than its place says.

    name: that of the version's folder. asset: that of the asset's folder.
    """
    made = fingerprint(
        manifest.asset,
        manifest.code_version,
        manifest.settings,
        manifest.inputs,
        manifest.environment,
    )
    if (manifest.asset, manifest.fingerprint) != (asset, name):
        found = f"describes {manifest.asset} {manifest.fingerprint}"
        yield Damage(where, found, f"the manifest of {asset} {name}")
    elif made != manifest.fingerprint:
        found = "was changed: its settings and inputs do not give its fingerprint"
        yield Damage(where, found, f"those of fingerprint {manifest.fingerprint}")


def _file_damage(path: Path, size: int, digest: str, sha256: Sha256) -> Iterator[Damage]:
    expected = f"sha256 {digest[:12]}…"
    try:
        if not path.is_file():
            yield Damage(str(path), "is missing", f"the file of the manifest, {expected}")
        elif (now := path.stat().st_size) != size:
            found = f"was changed after it was published: it has {now} bytes"
            yield Damage(str(path), found, f"{size} bytes, {expected}")
        elif (hashed := sha256(path)) != digest:
            found = f"was changed after it was published: sha256 {hashed[:12]}…"
            yield Damage(str(path), found, expected)
    except OSError as error:
        yield Damage(str(path), f"cannot be read ({error.strerror})", expected)


def remedy(folder: Path, is_current: bool) -> str:
    """Return the advice that heals the damaged version in <asset>/<partition>/<version>.

    Only a current one is made again by a run.
    """
    asset, partition = folder.parent.parent.name, folder.parent.name
    if asset in HISTORIES:
        return f"restore {folder} from a backup: a run cannot make a history again"
    if not is_current:
        return (
            f"restore {folder} from a backup: it is an older version, which no run makes again; "
            "or delete it, if you never go back to it"
        )
    again = f"materialize {asset} again (ft run --asset {asset})"
    if partition != UNPARTITIONED:
        again = (
            f"materialize {asset}[{partition}] again (ft run --asset {asset} --base {partition})"
        )
    if asset in SOURCES:
        again += f"; if its source is gone, restore {folder} from a backup"
    return again


def pointer_remedy(asset: str, partition: str | None) -> str:
    """Return the advice that heals a damaged CURRENT: a run writes it again, except a history's."""
    if asset in HISTORIES:
        return f"ft {asset} --repair"
    return f"ft run --asset {asset}" + (f" --base {partition}" if partition else "")


def _is_ours(name: str) -> bool:
    """Return True for the manifest, its signature, and what an operating system leaves."""
    return name.startswith(MANIFEST) or name.rpartition("/")[2].startswith(".")
