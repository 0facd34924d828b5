"""Sign a release, and verify one: the decision, the model's files, and the verdict behind it.

Two signatures lie in the `release` artifact, beside what they are about. model.sig is about every
file of the champion, in the form of OpenSSF model signing. release.sig is about the decision: the
files of the release with its history, the manifests of the champion and of its report, the number
of the decision, and the one before it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, JsonValue, ValidationError

from ft_assets.artifacts import Artifact, ArtifactStore, file_sha256, verify_files
from ft_assets.artifacts.manifest import MANIFEST, FileEntry, Manifest
from ft_assets.errors import ArtifactError, ReleaseError
from ft_assets.release.keys import SigningKey, TrustedKey
from ft_assets.release.lookup import by_content
from ft_assets.release.provenance import require_same_files
from ft_assets.release.register import ReleaseDocument, Status, state_of
from ft_assets.release.statements import (
    MODEL_SIGNATURE,
    Statement,
    Subject,
    Verified,
    model_files,
    model_statement,
    signed,
    verified,
)

RELEASE_SIGNATURE = "release.sig"
RELEASE = "https://ft_assets/release/v1"
DOCUMENTS = ("history.jsonl", "release.json")  # that a release must have, and sign


class Predecessor(BaseModel, frozen=True):
    """The decision before: its number, and the hash of its release.json."""

    sequence: int
    sha256: str


class SignedDecision(BaseModel, frozen=True):
    """The predicate of release.sig. manifests: {asset: manifest} of the champion and its report."""

    partition: str
    sequence: int
    decision: Status
    champion: str
    at: str
    run_id: str
    predecessor: Predecessor | None
    manifests: dict[str, dict[str, JsonValue]]


@dataclass(frozen=True)
class Release:
    """A release as it is verified: its artifact, its champion, and the store that has both."""

    store: ArtifactStore
    partition: str
    released: Artifact
    champion: Artifact

    @property
    def where(self) -> str:
        return f"release[{self.partition}]"


@dataclass(frozen=True)
class VerifiedRelease:
    """What a valid signature says."""

    decision: SignedDecision
    key: TrustedKey


def sign_release(
    output: Path,
    files: Mapping[str, FileEntry],
    *,
    champion: Artifact,
    report: Artifact | None,
    before: Artifact | None,
    key: SigningKey,
) -> None:
    """Write model.sig and release.sig into a release that is not published yet.

    files: the entries of the release. before: the release that it replaces.
    """
    document = ReleaseDocument.model_validate_json((output / "release.json").read_text())
    partition = champion.partition or ""
    of_the_model = signed(model_statement(partition, champion.manifest.files), key)
    (output / MODEL_SIGNATURE).write_text(of_the_model, encoding="utf-8")
    digests = {name: entry.sha256 for name, entry in files.items()}
    digests[MODEL_SIGNATURE] = hashlib.sha256(of_the_model.encode()).hexdigest()
    about = [champion, *([report] if report else [])]
    decision = SignedDecision(
        partition=partition,
        sequence=document.sequence,
        decision=document.decision,
        champion=champion.fingerprint,
        at=document.at,
        run_id=document.run_id,
        predecessor=_predecessor(before),
        manifests={one.asset: _plain(one.manifest) for one in about},
    )
    statement = Statement(
        subject=[
            Subject(name=name, digest={"sha256": digest})
            for name, digest in sorted(digests.items())
        ],
        predicate_type=RELEASE,
        predicate=decision.model_dump(mode="json"),
    )
    (output / RELEASE_SIGNATURE).write_text(signed(statement, key), encoding="utf-8")


def is_signed(released: Artifact) -> bool:
    """Return True if a release has a signature, by whatever key."""
    return RELEASE_SIGNATURE in released.manifest.files


def verify_decision(release: Release, keys: Sequence[TrustedKey]) -> VerifiedRelease:
    """Verify everything but the bytes of the weights: the decision, its files, the manifests.

    Raises ReleaseError if the release is not signed by a trusted key, or was changed since.
    """
    where, folder = release.where, release.released.path
    found = _statement(release.released, keys, where)
    decision = _decision(found.statement, where)
    if decision.partition != release.partition:
        raise _refused(where, f"is the signed release of {decision.partition}")
    digests = found.statement.digests
    now = {name: _digest(folder / name) for name in {*digests, *DOCUMENTS, MODEL_SIGNATURE}}
    present = {name: digest for name, digest in now.items() if digest is not None}
    require_same_files(digests, present, where, "the release")
    state = state_of(release.released)
    if state.sequence != decision.sequence:
        raise _refused(
            where, f"states decision {state.sequence}, and {decision.sequence} is signed"
        )
    _require_manifest(release.champion, decision, where)
    model = folder / MODEL_SIGNATURE
    of_the_model = verified(model.read_text(encoding="utf-8"), keys, f"{where}: {model}")
    entries = {name: one.sha256 for name, one in release.champion.manifest.files.items()}
    signed_files = model_files(of_the_model.statement, f"{where}: {model}")
    require_same_files(signed_files, entries, where, f"merged_model {release.champion.fingerprint}")
    return VerifiedRelease(decision, found.key)


def verify_release(release: Release, keys: Sequence[TrustedKey]) -> VerifiedRelease:
    """Verify a release whole, and read every byte of its model.

    No cache of hashes is used: whoever can write into the store can write into the cache too.
    Raises ReleaseError or ArtifactError for what does not hold.
    """
    found = verify_decision(release, keys)
    _require_latest(release, found, keys)
    verify_files(release.champion)
    report = report_of(release.store, release.partition, release.champion)
    if report is not None and report.asset in found.decision.manifests:
        _require_manifest(report, found.decision, release.where)
        verify_files(report)
    return found


def report_of(store: ArtifactStore, partition: str, champion: Artifact) -> Artifact | None:
    """Return the report that a champion was merged after, None if the store no longer has it."""
    version = champion.manifest.inputs.get("eval_report", "")
    return by_content(store, "eval_report", partition, version)


def _statement(released: Artifact, keys: Sequence[TrustedKey], where: str) -> Verified:
    path = released.path / RELEASE_SIGNATURE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReleaseError(
            where=where,
            found="the release is not signed, and a trusted key is configured",
            expected=f"{path}, signed by {' or '.join(key.fingerprint[:12] for key in keys)}",
            fix="restore the signed release from a backup. If it was never signed and you have "
            "checked the model, materialize release alone with vouch_for: its fingerprint, "
            f"{released.metrics.get('champion')}, and a reason",
        ) from None
    return verified(text, keys, f"{where}: {path}")


def _decision(statement: Statement, where: str) -> SignedDecision:
    if statement.predicate_type != RELEASE:
        raise _refused(where, f"has a signed statement of another kind ({RELEASE_SIGNATURE})")
    try:
        return SignedDecision.model_validate(statement.predicate)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _refused(
            where, f"has a signed statement without {'.'.join(map(str, first['loc']))}"
        ) from None


def _require_latest(release: Release, found: VerifiedRelease, keys: Sequence[TrustedKey]) -> None:
    """Raise ReleaseError if the store has a later signed release, or another one before this."""
    others, _ = release.store.versions("release", release.partition)
    before = found.decision.predecessor
    former = list[bool]()
    for other in others:
        if other.fingerprint == release.released.fingerprint or not is_signed(other):
            continue
        try:
            signature = _statement(other, keys, release.where)
            decision = _decision(signature.statement, release.where)
            if before is not None and decision.sequence == before.sequence:
                former.append(_digest(other.path / "release.json") == before.sha256)
        except (ReleaseError, ArtifactError):
            continue  # of a key that is no longer trusted, or damaged: it is not the current one
        if decision.sequence > found.decision.sequence:
            raise _refused(
                release.where,
                f"is decision {found.decision.sequence}, and the store has the signed decision "
                f"{decision.sequence} ({other.fingerprint}): an older release was put back",
            )
    if former and not any(former):
        raise _refused(release.where, "follows another release than the one in the store")


def _require_manifest(artifact: Artifact, decision: SignedDecision, where: str) -> None:
    """Raise ReleaseError unless an artifact's manifest is the signed one.

    Fields that a later version of ft_assets adds are not compared.
    """
    expected, now = decision.manifests.get(artifact.asset), _plain(artifact.manifest)
    if expected is None:
        raise _refused(where, f"does not sign the manifest of {artifact.asset}")
    for name, value in expected.items():
        if json.dumps(now.get(name), sort_keys=True) != json.dumps(value, sort_keys=True):
            raise _refused(
                where, f"{name} in {artifact.folder / MANIFEST} was changed after it was signed"
            )


def _plain(manifest: Manifest) -> dict[str, JsonValue]:
    """Return a manifest as its file has it, without the place, which an object store chooses.

    The text of a manifest stays what it was when a later version of ft_assets reads it.
    """
    fields = json.loads(manifest.to_text())
    fields.pop("place", None)
    return fields


def _predecessor(before: Artifact | None) -> Predecessor | None:
    if before is None:
        return None
    return Predecessor(
        sequence=state_of(before).sequence, sha256=file_sha256(before.path / "release.json")
    )


def _digest(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None


def _refused(where: str, found: str) -> ReleaseError:
    return ReleaseError(
        where=where,
        found=found,
        expected="the release as it was signed",
        fix="do not use this model; restore store and release from a backup that verifies",
    )
