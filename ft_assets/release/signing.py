"""What a project's keys ask of a release: whom to trust, what to sign, and when to refuse.

A release is signed only if all that it goes on with was signed: the decision before it, and the
model that becomes champion. Otherwise a signature would turn a changed store into a trusted one. A
person can vouch for a model that is not signed yet; the release records the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.artifacts.manifest import FileEntry
from ft_assets.config import Project
from ft_assets.errors import ReleaseError
from ft_assets.evaluation.report_model import Verdict
from ft_assets.release.keys import SigningKey, TrustedKey, signing_key, trusted_keys
from ft_assets.release.lookup import current_release, need_champion, need_model
from ft_assets.release.provenance import require_same_files, require_signed_files
from ft_assets.release.register import ReleaseDocument, ReleaseState, state_of
from ft_assets.release.signed_release import (
    Release,
    VerifiedRelease,
    is_signed,
    report_of,
    sign_release,
    verify_decision,
    verify_release,
)
from ft_assets.release.statements import model_files, verified

REPORT_SIGNATURE = "info/report.sig"
VOUCH = "check the model, then materialize release alone with vouch_for: {} and a reason"


@dataclass(frozen=True)
class Signing:
    """The keys of a project; vouched: the fingerprint of the model that a person vouches for."""

    key: SigningKey | None
    trusted: tuple[TrustedKey, ...]
    vouched: str | None

    @classmethod
    def of(cls, project: Project, vouched: str | None, where: str) -> "Signing":
        """Read the keys. Raises ReleaseError if signatures are asked for, and none can be made."""
        trusted, key = trusted_keys(project), signing_key(project)
        if trusted and key is None:
            raise ReleaseError(
                where=where,
                found=f"a trusted key is configured ({trusted[0].path}), and no key to sign with",
                expected="release.signing.key, so that the next release can be verified",
                fix="set it, or release on the machine that has the key",
            )
        return cls(key, trusted, vouched)

    def require_chain(self, store: ArtifactStore, name: str, where: str) -> None:
        """Raise ReleaseError unless the current release is signed as the next one will be."""
        current = current_release(store, name)
        if current is None:
            return
        champion = state_of(current).history[-1].subject
        if champion.merged_model == self.vouched:
            return
        if self.trusted:
            verify_decision(
                Release(store, name, current, need_model(store, name, champion, where)),
                self.trusted,
            )
        elif is_signed(current):
            raise ReleaseError(
                where=where,
                found="the current release is signed, and release.signing is not set any more",
                expected="the key that signs the next release too",
                fix="set release.signing again. To go on without signatures, "
                + VOUCH.format(champion.merged_model),
            )

    def proven(self, verdict: Verdict, report: Artifact, where: str) -> Verdict:
        """Return the verdict of a report that is as it was signed when it was scored.

        Without a trusted key it is returned as it is. Raises ReleaseError.
        """
        if not self.trusted:
            return verdict
        path = report.path / REPORT_SIGNATURE
        again = f"delete {report.folder} and run again: the kept answers are scored in seconds"
        if REPORT_SIGNATURE not in report.manifest.files or not path.is_file():
            raise ReleaseError(
                where=where,
                found=f"eval_report {report.fingerprint} was not signed when it was scored",
                expected=f"{REPORT_SIGNATURE} in it, which a project with a key writes",
                fix=again,
            )
        found = verified(path.read_text(encoding="utf-8"), self.trusted, f"{where}: {path}")
        files = {
            name: one.sha256
            for name, one in report.manifest.files.items()
            if name != REPORT_SIGNATURE
        }
        what = f"eval_report {report.fingerprint}"
        require_same_files(model_files(found.statement, str(path)), files, where, what, again)
        return verdict

    def require_model(self, merged: Artifact, state: ReleaseState, where: str) -> None:
        """Raise ReleaseError unless a model was signed when it was merged, or in a release."""
        if not self.trusted or merged.fingerprint == self.vouched:
            return
        if require_signed_files(merged, self.trusted, where) is not None:
            return
        models = [state.champion, state.previous, *(line.champion for line in state.history)]
        if any(model and model.data_version == merged.data_version for model in models):
            return
        raise ReleaseError(
            where=where,
            found=f"merged_model {merged.fingerprint} was not signed when it was merged",
            expected="the signature that a merge with release.signing writes",
            fix=VOUCH.format(merged.fingerprint),
        )

    def sign(
        self,
        store: ArtifactStore,
        name: str,
        before: Artifact | None,
        output: Path,
        files: Mapping[str, FileEntry],
    ) -> dict[str, str]:
        """Sign a release that is not published yet; return its metrics. Without a key: nothing."""
        if self.key is None:
            return {}
        document = ReleaseDocument.model_validate_json((output / "release.json").read_text())
        champion = need_model(store, name, document.subject, f"release[{name}]")
        report = report_of(store, name, champion)
        sign_release(output, files, champion=champion, report=report, before=before, key=self.key)
        return {"signed_with": self.key.fingerprint}


@dataclass(frozen=True)
class ProvenRelease:
    """The current release and its champion; signature: None if no trusted key is configured."""

    released: Artifact
    champion: Artifact
    signature: VerifiedRelease | None


def proven_release(
    project: Project, store: ArtifactStore, name: str, where: str, *, weights: bool = True
) -> ProvenRelease:
    """Return the current release and its champion, verified by hash, and by key if there is one.

    weights: True reads every byte of a signed model, instead of those of files that changed since
    they were read. Raises ReleaseError or ArtifactError.
    """
    released, champion = need_champion(store, name, where)
    store.verified(champion)
    signature, trusted = None, trusted_keys(project)
    if trusted:
        verify = verify_release if weights else verify_decision
        signature = verify(Release(store, name, released, champion), trusted)
    return ProvenRelease(released, champion, signature)
