"""What a later artifact recorded of an earlier one: the version and the files that it read.

A manifest that was changed together with its own hashes still disagrees with these records.
"""

from collections.abc import Iterable

from ft_assets.artifacts import Artifact
from ft_assets.artifacts.verification import HISTORIES, Damage


def require_recorded(later: Artifact, inputs: Iterable[Artifact]) -> None:
    """Raise ArtifactError if an input is not what a later artifact read of it."""
    by_fingerprint = {one.fingerprint: one for one in inputs}
    for name, read in later.manifest.inputs_read.items():
        found = by_fingerprint.get(read.fingerprint)
        if found is not None and (damage := disagreement(found, name, later)) is not None:
            raise damage.error(record_fix(found, later))


def disagreement(artifact: Artifact, name: str, later: Artifact) -> Damage | None:
    """Compare a version with what a later artifact recorded of it as its input `name`."""
    read, part = later.manifest.inputs_read[name], name.partition("#")[2] or None
    which = f"{label(later.asset, later.partition)} {later.fingerprint[:8]}"
    version = artifact.part_version(part)
    if (then := later.manifest.inputs.get(name)) != version:
        expected = f"version {then}, from which {which} was made"
        return Damage(str(artifact.folder), f"has the content of version {version}", expected)
    if read.files != artifact.manifest.files_version:
        expected = f"the files that {which} read"
        return Damage(str(artifact.folder), "has other files under the same version", expected)
    return None


def record_fix(artifact: Artifact, later: Artifact) -> str:
    """Return what heals a version that disagrees with a record of it."""
    if HISTORIES & {artifact.asset, later.asset}:
        return f"restore {artifact.folder} from a backup"
    base = f" --base {later.partition}" if later.partition else ""
    return (
        f"restore {artifact.folder} from a backup; or delete it and {later.folder}, and make both "
        f"again: ft run{base}"
    )


def label(asset: str, partition: str | None) -> str:
    """Return the name of an asset, or of a partition of it."""
    return f"{asset}[{partition}]" if partition else asset
