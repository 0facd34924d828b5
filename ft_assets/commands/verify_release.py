"""`ft verify --release`: whether the releases are those that the holder of a key signed."""

from collections.abc import Sequence

from pydantic import BaseModel

from ft_assets.artifacts import ArtifactStore
from ft_assets.commands.store_view import in_bytes
from ft_assets.config import Project
from ft_assets.errors import FtError, ReleaseError
from ft_assets.release.keys import TRUSTED_VARIABLE, TrustedKey, trusted_keys
from ft_assets.release.lookup import need_champion
from ft_assets.release.signed_release import Release, verify_release


class CheckedRelease(BaseModel, frozen=True):
    """The outcome for one base model: the signed decision, or what does not hold."""

    base_model: str
    error: str | None = None
    sequence: int | None = None
    decision: str | None = None
    at: str | None = None
    champion: str | None = None
    path: str | None = None
    files: int | None = None
    bytes: int | None = None
    key: str | None = None

    def to_text(self) -> str:
        """Return the outcome for a person."""
        if self.error is not None:
            return f"{self.base_model}: NOT VERIFIED\n{self.error}"
        size = f"{self.files} files, {in_bytes(self.bytes or 0)}"
        return (
            f"{self.base_model}: verified: decision {self.sequence} ({self.decision}, {self.at}), "
            f"merged_model {self.champion} ({size})\n  {self.path}\n  key {self.key}"
        )


def check_releases(
    project: Project,
    store: ArtifactStore,
    names: Sequence[str],
    keys: Sequence[TrustedKey],
    at_least: int,
) -> list[CheckedRelease]:
    """Verify the current release of each base model, every byte of it.

    keys: of the command line; without them those of the project. at_least: the number that the
    last decision must have. Raises ReleaseError without any key.
    """
    trusted = list(keys) or list(trusted_keys(project))
    if not trusted:
        raise ReleaseError(
            where="ft verify --release",
            found="no trusted key is configured",
            expected=f"--key, release.signing.trusted, or {TRUSTED_VARIABLE}",
            fix="give the public key: --key release.pub; without a key, ft verify compares hashes",
        )
    return [_check(store, name, trusted, at_least) for name in names]


def _check(
    store: ArtifactStore, name: str, trusted: Sequence[TrustedKey], at_least: int
) -> CheckedRelease:
    try:
        released, champion = need_champion(store, name, f"release[{name}]")
        found = verify_release(Release(store, name, released, champion), trusted)
        decision = found.decision
        if decision.sequence < at_least:
            raise ReleaseError(
                where=f"release[{name}]",
                found=f"is decision {decision.sequence}: an older store was put back",
                expected=f"decision {at_least} or a later one (--at-least)",
                fix="restore the store from a newer backup",
            )
    except FtError as error:
        return CheckedRelease(base_model=name, error=str(error))
    return CheckedRelease(
        base_model=name,
        sequence=decision.sequence,
        decision=decision.decision,
        at=decision.at,
        champion=champion.fingerprint,
        path=str(champion.path),
        files=len(champion.manifest.files),
        bytes=champion.manifest.bytes,
        key=found.key.fingerprint,
    )
