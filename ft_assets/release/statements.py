"""in-toto statements, and their signatures: DSSE envelopes in a sigstore bundle.

Formats: in-toto Attestation Framework v1 (statement), DSSE v1 (envelope), sigstore bundle v0.3, and
OpenSSF Model Signing v1.0, whose command `model_signing verify key` reads the signature of a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ft_assets.artifacts.manifest import MANIFEST, FileEntry
from ft_assets.errors import ReleaseError
from ft_assets.release.keys import SigningKey, TrustedKey, require_library

STATEMENT = "https://in-toto.io/Statement/v1"
MODEL_SIGNING = "https://model_signing/signature/v1.0"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
MODEL_SIGNATURE = "model.sig"
# Beside the model in the store or in a repository, and not a part of it.
NOT_OF_THE_MODEL = (MANIFEST, MODEL_SIGNATURE, ".git", ".gitattributes", ".gitignore")


class Subject(BaseModel, frozen=True):
    """What a statement is about: a name and its digests, {"sha256": hex}."""

    name: str
    digest: dict[str, str]


class Statement(BaseModel):
    """An in-toto statement: a predicate about subjects."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(
        default=STATEMENT, validation_alias="_type", serialization_alias="_type"
    )
    subject: list[Subject]
    predicate_type: str = Field(
        validation_alias="predicateType", serialization_alias="predicateType"
    )
    predicate: dict[str, JsonValue]

    def to_json(self) -> str:
        """Return the JSON text."""
        return json.dumps(self.model_dump(by_alias=True), indent=1, ensure_ascii=False)

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each subject, by its name."""
        return {one.name: one.digest.get("sha256", "") for one in self.subject}


@dataclass(frozen=True)
class Verified:
    """A statement whose signature is that of a trusted key."""

    statement: Statement
    key: TrustedKey


def signed(statement: Statement, key: SigningKey) -> str:
    """Sign a statement; return the sigstore bundle as JSON."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(statement.to_json().encode(), PAYLOAD_TYPE, {})
    envelope.sign(key.signer)
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": key.fingerprint}, "tlogEntries": []},
        "dsseEnvelope": envelope.to_dict(),
    }
    return json.dumps(bundle, indent=1)


def verified(text: str, keys: Sequence[TrustedKey], where: str) -> Verified:
    """Return the statement of a bundle. Raises ReleaseError unless a trusted key signed it."""
    require_library()
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import FormatError, VerificationError

    trusted = ", ".join(f"{key.fingerprint[:12]} ({key.path})" for key in keys)
    hint = "?"
    try:
        bundle = json.loads(text)
        hint = str(bundle["verificationMaterial"]["publicKey"]["hint"])
        envelope = Envelope.from_dict(bundle["dsseEnvelope"])
        accepted = envelope.verify([key.public for key in keys], 1)
        statement = Statement.model_validate_json(envelope.payload)
        if envelope.payload_type != PAYLOAD_TYPE or len(envelope.signatures) != 1:
            raise ValueError("it is not one signature of an in-toto statement")
    except VerificationError:
        known = hint in {key.fingerprint for key in keys}
        found = "the content was changed after it was signed" if known else "by another key"
        raise ReleaseError(
            where=where,
            found=f"the signature does not hold: {found} (it names the key {hint[:12]})",
            expected=f"a signature by {trusted}",
            fix="do not use this model; restore it from a backup that verifies, or add the key to "
            "release.signing.trusted if you know whose it is",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, FormatError) as error:
        detail = "no statement" if isinstance(error, ValidationError) else type(error).__name__
        raise ReleaseError(
            where=where,
            found=f"is damaged: not a signature ({detail})",
            expected=f"a sigstore bundle signed by {trusted}",
            fix="restore it from a backup",
        ) from None
    fingerprint = next(iter(accepted))
    return Verified(statement, next(key for key in keys if key.fingerprint == fingerprint))


def model_statement(name: str, files: Mapping[str, FileEntry]) -> Statement:
    """State the files of a model as OpenSSF Model Signing v1.0 does, from known hashes.

    The subject's digest is the SHA-256 of the files' digests, in the order of the resources.
    """
    resources: list[JsonValue] = [
        {"name": path, "algorithm": "sha256", "digest": entry.sha256}
        for path, entry in sorted(files.items())
    ]
    root = hashlib.sha256(
        b"".join(bytes.fromhex(entry.sha256) for _, entry in sorted(files.items()))
    )
    serialization: dict[str, JsonValue] = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": list[JsonValue](NOT_OF_THE_MODEL),
    }
    return Statement(
        subject=[Subject(name=name, digest={"sha256": root.hexdigest()})],
        predicate_type=MODEL_SIGNING,
        predicate={"serialization": serialization, "resources": resources},
    )


def sign_files(
    name: str, key: SigningKey | None, path: str, output: Path, files: Mapping[str, FileEntry]
) -> dict[str, str]:
    """Sign the files of an artifact as those of a model, in a file at `path`, if there is a key.

    A `finish` of the materializer, without metrics of its own.
    """
    if key is not None:
        target = output / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(signed(model_statement(name, files), key), encoding="utf-8")
    return {}


def model_files(statement: Statement, where: str) -> dict[str, str]:
    """Return {file: SHA-256} of a statement by `model_statement`. Raises ReleaseError."""
    if statement.predicate_type != MODEL_SIGNING:
        raise ReleaseError(
            where=where,
            found=f"is a signed statement of another kind ({statement.predicate_type})",
            expected=f"the signature of a model ({MODEL_SIGNING})",
            fix="restore it from a backup",
        )
    resources: Any = statement.predicate["resources"]
    return {one["name"]: one["digest"] for one in resources}
