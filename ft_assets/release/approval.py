"""A person's approval: a promotion or a rollback is proposed, and becomes a decision by a name.

A proposal is an entry of the register like any other: the champion stays the one before. An answer
to it is an entry too, signed as the project is set, with who, when, what, and why. It names the
fingerprint of the proposed model, so that a newer proposal voids it. Pure of Dagster, no torch.
"""

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from ft_assets.artifacts import Artifact, ArtifactStore, fingerprint
from ft_assets.artifacts.manifest import FileEntry, Read, file_entries
from ft_assets.config import Project, ReleaseSettings
from ft_assets.errors import ReleaseError
from ft_assets.release.lookup import current_release, find_model, need_model
from ft_assets.release.register import (
    PROMOTED,
    REJECTED,
    ROLLED_BACK,
    Approval,
    HistoryEntry,
    ReleasedModel,
    ReleaseState,
    entry_metrics,
    gain_of,
    state_of,
    withdrawn_by,
    write_release,
)
from ft_assets.release.signing import Signing
from ft_assets.release.whole_register import turn

TIME = "%Y-%m-%d %H:%M:%S"  # of the register, UTC
LEAST_PREFIX = 8  # characters of a fingerprint that a person may abbreviate
DAY = 86_400.0
CHALLENGER = "challenger_gain_"
CHAMPION = "champion_gain_"


class Answer(BaseModel, frozen=True):
    """What a person decided. version: the fingerprint of the proposed merged_model.

    by: how the name is known.
    """

    decision: Literal["approve", "reject"]
    version: str
    name: str
    reason: str
    by: str


@dataclass(frozen=True)
class Proposal:
    """A proposal that awaits approval. since, expires: seconds since 1970, UTC."""

    partition: str
    released: Artifact
    entry: HistoryEntry
    since: float
    expires: float

    @property
    def model(self) -> ReleasedModel:
        return self.entry.challenger

    @property
    def what(self) -> str:
        """The proposed change in words."""
        change = "a rollback to" if self.entry.proposes == ROLLED_BACK else "the promotion of"
        return f"{change} merged_model {self.model.merged_model}"

    def has_lapsed(self, now: float | None = None) -> bool:
        return (time.time() if now is None else now) > self.expires


def now_text() -> str:
    """Return the time as the register writes it."""
    return datetime.datetime.now(datetime.UTC).strftime(TIME)


def proposal_of(store: ArtifactStore, name: str, settings: ReleaseSettings) -> Proposal | None:
    """Return the open proposal of a base model, also one that has lapsed. Raises ReleaseError."""
    released = current_release(store, name)
    return None if released is None else _proposal(name, released, settings)


def lapse(name: str, released: Artifact | None, settings: ReleaseSettings) -> str | None:
    """Return the sentence about the current proposal if it has lapsed: it must be judged again."""
    found = None if released is None else _proposal(name, released, settings)
    if found is None or not found.has_lapsed():
        return None
    return _lapsed(found, settings)


def answer(
    project: Project, store: ArtifactStore, name: str, given: Answer, run_id: str
) -> Artifact:
    """Decide the open proposal of a base model: publish the new decision, and return it.

    Raises ReleaseError if there is none, if it is about another version, or if it has lapsed; and
    ArtifactError if the proposed model is not as it was published.
    """
    where = f"release[{name}]"
    current = current_release(store, name)
    found = None if current is None else _proposal(name, current, project.release)
    if current is None or found is None:
        raise ReleaseError(
            where=where,
            found="nothing awaits approval",
            expected="a proposal, which a run makes with release.approval: required",
            fix=f"ft release --base {name} shows what was decided",
        )
    _require(given, found, project.release, where)
    state, model = state_of(current), need_model(store, name, found.model, where)
    signing = Signing.of(project, None, where)
    signing.require_chain(store, name, where)
    if given.decision == "approve":
        store.verified(model)
        signing.require_model(model, state, where)
    entry = _entry(state, found, given, run_id)
    return _publish(store, name, current, model, entry, signing)


def _lapsed(found: Proposal, settings: ReleaseSettings) -> str:
    days = settings.approval_expires_days
    return f"the proposal {found.entry.sequence} lapsed: nobody decided within {days:g} days"


def _proposal(name: str, released: Artifact, settings: ReleaseSettings) -> Proposal | None:
    entry = state_of(released).proposal
    if entry is None:
        return None
    at = datetime.datetime.strptime(entry.at, TIME).replace(tzinfo=datetime.UTC).timestamp()
    return Proposal(name, released, entry, at, at + settings.approval_expires_days * DAY)


def _require(given: Answer, found: Proposal, settings: ReleaseSettings, where: str) -> None:
    """Raise ReleaseError unless an answer is complete, and about this proposal."""
    version = found.model.merged_model
    empty = [field for field in ("name", "reason") if not getattr(given, field).strip()]
    if empty:
        raise ReleaseError(
            where=where,
            found=f"an answer without {' and '.join(empty)}",
            expected="the name of who decides and a reason in a sentence; both are recorded",
            fix=f"give {' and '.join(empty)}",
        )
    if len(given.version) < LEAST_PREFIX or not version.startswith(given.version):
        raise ReleaseError(
            where=where,
            found=f"the answer is about version {given.version or '(none)'}, and {version} is "
            "proposed",
            expected=f"the fingerprint of the proposed merged_model, or its first {LEAST_PREFIX} "
            "characters",
            fix=f"look at the proposal; if it is right, answer with version {version}",
        )
    if found.has_lapsed():
        again = f"judge it again: ft run --base {found.partition} --asset release"
        if found.entry.proposes == ROLLED_BACK:
            again = f"materialize release again with rollback_to: {version} and a reason"
        raise ReleaseError(
            where=where,
            found=f"{_lapsed(found, settings)} (release.approval_expires_days)",
            expected="an answer to a proposal that was judged recently",
            fix=again,
        )


def _entry(state: ReleaseState, found: Proposal, given: Answer, run_id: str) -> HistoryEntry:
    proposed, at = found.entry, now_text()
    approval = Approval(
        sequence=proposed.sequence,
        merged_model=proposed.challenger.merged_model,
        identity=proposed.challenger.identity,
        name=given.name.strip(),
        reason=given.reason.strip(),
        at=at,
        by=given.by,
    )
    verb = "approved" if given.decision == "approve" else "rejected"
    said = f"{verb} by {approval.name} ({approval.by}): {approval.reason}"
    approved = given.decision == "approve"
    assert proposed.proposes is not None, "a proposal has what it proposes"
    old = state.champion
    rollback = proposed.proposes == ROLLED_BACK and old is not None
    return HistoryEntry(
        sequence=state.sequence + 1,
        decision=proposed.proposes if approved else REJECTED,
        # The reason of a rollback is the first one: it is why the model is withdrawn.
        reasons=[*proposed.reasons, said] if approved else [said, *proposed.reasons],
        champion=proposed.challenger if approved else old,
        challenger=old if approved and rollback and old else proposed.challenger,
        at=at,
        run_id=run_id,
        comparison=proposed.comparison,
        proposes=proposed.proposes,
        approval=approval,
    )


def _publish(
    store: ArtifactStore,
    name: str,
    current: Artifact,
    model: Artifact,
    entry: HistoryEntry,
    signing: Signing,
) -> Artifact:
    """Publish a decision as the asset `release` does: with its models as inputs, and signed."""
    state = state_of(current)
    read = _models(store, name, state, entry, model)
    inputs = {key: one.data_version for key, one in read.items()}
    settings: dict[str, Any] = {"approval": entry.to_dict()["approval"], "sequence": entry.sequence}
    code, started = "approval", time.time()
    with store.staging("release", name) as staged:
        write_release(staged, state, entry, withdrawn_by([*state.history, entry]))
        files: Mapping[str, FileEntry] = file_entries(staged)
        signed = signing.sign(store, name, current, staged, files)
        return store.publish(
            Path(staged),
            asset="release",
            partition=name,
            version=fingerprint("release", code, settings, inputs, {}),
            code_version=code,
            settings=settings,
            inputs=inputs,
            environment={},
            metrics={**entry_metrics(entry), **_gain(entry, current, model), **signed},
            parts={"champion": entry.champion.identity if entry.champion else ""},
            started=started,
            inputs_read={
                key: Read(fingerprint=one.fingerprint, files=one.manifest.files_version)
                for key, one in read.items()
            },
            turn=turn(store, name, current, entry.sequence),
            known=files,
        )


def _models(
    store: ArtifactStore, name: str, state: ReleaseState, entry: HistoryEntry, proposed: Artifact
) -> dict[str, Artifact]:
    """Return the inputs of a decision: `ft gc` keeps the champion, and the one before it."""
    old, new = state.champion, entry.champion
    changed = old is not None and new is not None and old.identity != new.identity
    previous = old if changed else state.previous
    found = {
        "champion": proposed
        if entry.decision != REJECTED
        else new and find_model(store, name, new),
        "previous_champion": previous and find_model(store, name, previous),
        "rejected": proposed if entry.decision == REJECTED else None,
    }
    return {key: model for key, model in found.items() if model is not None}


def _gain(entry: HistoryEntry, current: Artifact, model: Artifact) -> dict[str, Any]:
    """Return the gain over the base of the champion after a decision, from the proposal."""
    if entry.decision == REJECTED:
        own = (CHAMPION, "champion_beats_base", "measured_today")
        return {key: value for key, value in current.metrics.items() if key.startswith(own)}
    measured = {
        key.replace(CHALLENGER, CHAMPION): value
        for key, value in current.metrics.items()
        if key.startswith(CHALLENGER)
    }
    if entry.decision == PROMOTED and measured:
        beats = current.metrics["challenger_beats_base"]
        return {**measured, "champion_beats_base": beats, "measured_today": True}
    return {**gain_of(model), "measured_today": entry.decision == PROMOTED}
