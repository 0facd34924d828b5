"""The keys of signed releases: EC keys in PEM files, as `openssl` writes them.

The private key never enters the project: it is a file outside of it, which only its owner can read,
and its password is in the environment. A key's fingerprint is the SHA-256 of its public PEM file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ft_assets.config import Project
from ft_assets.errors import ReleaseError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from securesystemslib.signer import CryptoSigner, SSlibKey  # pyright: ignore

TRUSTED_VARIABLE = "FT_TRUSTED_KEYS"
WHERE_KEY = "finetune.yaml: release.signing.key"
CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those of sigstore's bundles
MAKE_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out release.pem; chmod 600 release.pem"
MAKE_PUBLIC = "openssl ec -in release.pem -pubout -out release.pub"


@dataclass(frozen=True)
class TrustedKey:
    """A public key whose signatures count. `path` is shown in messages."""

    fingerprint: str
    path: str
    public: SSlibKey


@dataclass(frozen=True)
class SigningKey:
    """The private key that signs, and the fingerprint of its public half."""

    fingerprint: str
    signer: CryptoSigner


def trusted_keys(project: Project) -> tuple[TrustedKey, ...]:
    """Return the public keys whose signatures count; none: signatures are not verified.

    FT_TRUSTED_KEYS replaces the list of finetune.yaml, so that whoever can edit that file cannot
    add a key. Raises ReleaseError for a file that is not a public EC key.
    """
    from_environment = os.environ.get(TRUSTED_VARIABLE)
    if from_environment is not None:
        paths = [path for path in from_environment.split(os.pathsep) if path]
        if not paths:
            raise _unusable(TRUSTED_VARIABLE, "is empty", "paths of public keys", "unset it")
        return tuple(_public_key(TRUSTED_VARIABLE, Path(path).expanduser()) for path in paths)
    signing = project.release.signing
    if signing is None:
        return ()
    where = "finetune.yaml: release.signing.trusted"
    if signing.trusted:
        files = [project.path(_expanded(where, path)) for path in signing.trusted]
        return tuple(_public_key(where, path) for path in files)
    private = _private_key(project)
    assert private is not None, "the settings have a key or trusted keys"
    return (_trusted(_public_pem(private), WHERE_KEY),)


def public_key(path: Path) -> TrustedKey:
    """Return the public key that a command-line option names. Raises ReleaseError."""
    return _public_key("--key", path.expanduser())


def signing_key(project: Project) -> SigningKey | None:
    """Return the private key of this project, None if it has none.

    Raises ReleaseError if it cannot be used, lies in the project or store, can be read by others,
    or is not one of the trusted keys.
    """
    private = _private_key(project)
    if private is None:
        return None
    from securesystemslib.signer import CryptoSigner, SSlibKey  # pyright: ignore

    pem = _public_pem(private)
    fingerprint = hashlib.sha256(pem).hexdigest()
    trusted = trusted_keys(project)
    if fingerprint not in {key.fingerprint for key in trusted}:
        known = ", ".join(f"{key.fingerprint[:12]} ({key.path})" for key in trusted)
        raise _unusable(
            WHERE_KEY,
            f"signs as {fingerprint[:12]}, which is not a trusted key",
            f"one of the trusted keys: {known}",
            "add its public key to release.signing.trusted, or sign with a trusted key",
        )
    public = SSlibKey.from_crypto(private.public_key(), keyid=fingerprint)
    return SigningKey(fingerprint, CryptoSigner(private, public))


def _private_key(project: Project) -> EllipticCurvePrivateKey | None:
    """Read release.signing.key, None if it is not set."""
    signing = project.release.signing
    if signing is None or signing.key is None:
        return None
    require_library()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = project.path(_expanded(WHERE_KEY, signing.key))
    _require_outside(path, project)
    data = _read(WHERE_KEY, path, f"make a key outside of the project: {MAKE_KEY}")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise _unusable(
            WHERE_KEY,
            f"{path} can be read by others (mode {stat.S_IMODE(path.stat().st_mode):04o})",
            "mode 0600",
            f"chmod 600 {path}; make a new key if somebody else may have read it",
        )
    password = _password(signing.password_env)
    try:
        key = load_pem_private_key(data, password)
    except (TypeError, ValueError) as error:
        # The client's text names no secret: it says that a password is missing, wrong, or unused.
        needs = "set password_env to the name of the variable with its password"
        raise _unusable(
            WHERE_KEY,
            f"{path} cannot be read as a key ({str(error).splitlines()[0]})",
            "a PEM file with a private EC key, and its password if it has one",
            f"{needs}, or make another key: {MAKE_KEY}",
        ) from None
    return _require_curve(WHERE_KEY, path, key)


def _password(variable: str | None) -> bytes | None:
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        raise _unusable(
            "finetune.yaml: release.signing.password_env",
            f"the environment variable {variable} is not set",
            "the password of the key in it",
            f"export {variable}=… before starting, or remove password_env",
        )
    return value.encode()


def _require_outside(path: Path, project: Project) -> None:
    """Raise ReleaseError for a key in the project or its store, which others read and back up."""
    real = path.resolve()
    for folder, name in ((project.store_path, "the store"), (project.root, "the project")):
        if real.is_relative_to(folder.resolve()):
            raise _unusable(
                WHERE_KEY,
                f"{path} lies in {name} ({folder.resolve()})",
                "a private key outside of the project and its store",
                "move it, e.g. to ~/.config/ft/, and make a new one if the folder was shared",
            )


def _public_key(where: str, path: Path) -> TrustedKey:
    require_library()
    data = _read(where, path, f"make it from the private key: {MAKE_PUBLIC}")
    return _trusted(data, where, path)


def _trusted(data: bytes, where: str, path: Path | None = None) -> TrustedKey:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey  # pyright: ignore

    try:
        key = load_pem_public_key(data)
    except ValueError:
        raise _unusable(
            where,
            f"{path} is not a public key in PEM",
            "a file that begins with -----BEGIN PUBLIC KEY-----",
            f"make it from the private key: {MAKE_PUBLIC}",
        ) from None
    _require_curve(where, path, key)
    fingerprint = hashlib.sha256(_pem(key)).hexdigest()
    return TrustedKey(fingerprint, str(path or where), SSlibKey.from_crypto(key, keyid=fingerprint))


def _require_curve(where: str, path: Path | None, key: object) -> EllipticCurvePrivateKey:
    """Return an EC key as it is. Raises ReleaseError for RSA, Ed25519 and other curves."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in CURVES:
        raise _unusable(
            where,
            f"{path} is {curve or type(key).__name__}",
            "an EC key on P-256, P-384 or P-521, which OpenSSF model signing can verify",
            f"make one: {MAKE_KEY}",
        )
    return key  # type: ignore[return-value]  # only EC keys have these curves


def _public_pem(private: EllipticCurvePrivateKey) -> bytes:
    return _pem(private.public_key())


def _pem(public: object) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    form = PublicFormat.SubjectPublicKeyInfo
    return public.public_bytes(Encoding.PEM, form)  # type: ignore[attr-defined]


def _expanded(where: str, path: str) -> str:
    expanded = str(Path(os.path.expandvars(path)).expanduser())
    if "$" in expanded:
        raise _unusable(
            where, f"{path}: an environment variable in it is not set", "a path", "set the variable"
        )
    return expanded


def _read(where: str, path: Path, fix: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        found = f"{path} cannot be read ({error.strerror})"
        raise _unusable(where, found, "a PEM file", fix) from None


def require_library() -> None:
    """Raise ReleaseError if the libraries of signatures are not installed."""
    import importlib.util

    missing = [
        name
        for name in ("cryptography", "securesystemslib")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise _unusable(
            "release.signing",
            f"{', '.join(missing)} is not installed",
            "the extra `signing`",
            'pip install "ft_assets[signing]"',
        )


def _unusable(where: str, found: str, expected: str, fix: str) -> ReleaseError:
    return ReleaseError(where=where, found=found, expected=expected, fix=fix)
