"""The provenance of a merged model: an in-toto statement with a SLSA predicate, beside its card.

Specification: SLSA provenance v1 (https://slsa.dev/spec/v1.0/provenance). The lineage is in the
resolved dependencies: data files, base model, each artifact, packages. It is written for every
merged model, and signed if the project has a key.
"""

import datetime
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from pydantic import JsonValue

from ft_assets.artifacts import Artifact
from ft_assets.artifacts.manifest import INFO, FileEntry
from ft_assets.errors import ReleaseError
from ft_assets.release.card_facts import CardFacts, shareable
from ft_assets.release.keys import SigningKey, TrustedKey
from ft_assets.release.statements import Statement, Subject, signed, verified

SLSA = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://ft_assets/fine-tuning/v1"
BUILDER = "https://ft_assets/dagster/v1"
PROVENANCE = f"{INFO}/provenance.json"
SIGNED_PROVENANCE = f"{INFO}/provenance.sigstore.json"


@dataclass(frozen=True)
class Build:
    """One merge: its Dagster run, its start in seconds since 1970, its settings and its lineage.

    settings: the identity of the merged model. lineage: the artifacts it was made from, by asset.
    """

    run_id: str
    started: float
    settings: JsonValue
    facts: CardFacts
    lineage: Mapping[str, Artifact]


def write_provenance(
    output: Path, files: Mapping[str, FileEntry], build: Build, key: SigningKey | None
) -> None:
    """Write the provenance of these files below info/, and its signature if there is a key."""
    statement = provenance(files, build)
    (output / INFO).mkdir(exist_ok=True)
    (output / PROVENANCE).write_text(statement.to_json(), encoding="utf-8")
    if key is not None:
        (output / SIGNED_PROVENANCE).write_text(signed(statement, key), encoding="utf-8")


def provenance(files: Mapping[str, FileEntry], build: Build) -> Statement:
    """Return the statement about a merged model: its files are the subjects."""
    facts = build.facts
    return Statement(
        subject=[
            Subject(name=name, digest={"sha256": entry.sha256}) for name, entry in files.items()
        ],
        predicate_type=SLSA,
        predicate={
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "base_model": facts.partition,
                    "finetune.yaml": yaml.safe_load(facts.yaml),
                },
                "internalParameters": {"merged_model": build.settings},
                "resolvedDependencies": list(_dependencies(build)),
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER,
                    "version": {"ft_assets": facts.libraries["ft_assets"]},
                },
                "metadata": {
                    "invocationId": build.run_id,
                    "startedOn": _time(build.started),
                    "finishedOn": _time(datetime.datetime.now(datetime.UTC).timestamp()),
                },
            },
        },
    )


def require_signed_files(
    merged: Artifact, keys: tuple[TrustedKey, ...], where: str
) -> TrustedKey | None:
    """Return the key that signed a merged model's files when it was merged, None if none did.

    Raises ReleaseError if a file is not the signed one.
    """
    path = merged.path / SIGNED_PROVENANCE
    if SIGNED_PROVENANCE not in merged.manifest.files or not path.is_file():
        return None
    found = verified(path.read_text(encoding="utf-8"), keys, f"{where}: {path}")
    own = (PROVENANCE, SIGNED_PROVENANCE)
    now = {name: one.sha256 for name, one in merged.manifest.files.items() if name not in own}
    require_same_files(found.statement.digests, now, where, f"merged_model {merged.fingerprint}")
    return found.key


def require_same_files(
    signed_files: Mapping[str, str],
    now: Mapping[str, str],
    where: str,
    what: str,
    fix: str = "do not use this model; restore it from a backup that verifies, or roll back",
) -> None:
    """Raise ReleaseError for the first file that is not the signed one, was added, or is gone."""
    for name in sorted({*signed_files, *now}):
        if signed_files.get(name) == now.get(name):
            continue
        problem = "was changed after it was signed"
        if name not in now:
            problem = "is missing, and was signed"
        elif name not in signed_files:
            problem = "was added after the signature"
        raise ReleaseError(
            where=where,
            found=f"{name} of {what} {problem}",
            expected="exactly the files that were signed, byte for byte",
            fix=fix,
        )


def _dependencies(build: Build) -> Iterator[JsonValue]:
    """Yield the resource descriptors of the lineage."""
    for asset in ("raw_dataset", "raw_preferences", "raw_text"):
        if asset in build.lineage:
            yield from _data_files(build.lineage[asset].manifest.settings.get("files", {}))
    yield from _base_source(build)
    for asset, artifact in build.lineage.items():
        manifest = artifact.manifest
        digest = hashlib.sha256(manifest.to_text().encode()).hexdigest()
        yield {
            "name": f"{asset}/manifest.json",
            "digest": {"sha256": digest},
            "annotations": {
                "fingerprint": manifest.fingerprint,
                "dataVersion": manifest.data_version,
                "codeVersion": manifest.code_version,
            },
        }
    for package, version in build.facts.libraries.items():
        yield {"uri": f"pkg:pypi/{package}@{quote(version)}"}
    yield {"uri": f"pkg:generic/python@{build.facts.python}"}


def _data_files(files: Mapping[str, list[Any]]) -> Iterator[JsonValue]:
    for key, entries in files.items():
        for name, digest in entries:
            yield {"name": f"data.{key}: {shareable(name)}", "digest": {"sha256": digest}}


def _base_source(build: Build) -> Iterator[JsonValue]:
    """Yield the base model as it was given: a hub commit, or files by content."""
    base = build.facts.base
    if base.hub and base.revision:
        yield {
            "name": base.hub,
            "uri": f"pkg:huggingface/{base.hub}@{base.revision}",
            "digest": {"gitCommit": base.revision},
        }
    identity = build.lineage["base_model"].manifest.settings.get("identity", {})
    whole = {identity["gguf"]: identity["sha256"]} if "sha256" in identity else {}
    for name, digest in (identity.get("contents") or whole).items():
        yield {"name": f"base model: {shareable(name)}", "digest": {"sha256": digest}}


def _time(seconds: float) -> str:
    """Return RFC 3339 in UTC."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
