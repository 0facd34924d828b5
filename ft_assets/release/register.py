"""The register of released models: the champion, its predecessors, and the reason of each decision.

release.json of the current `release` artifact is the state; history.jsonl beside it has one
decision per line. Each artifact has the whole history, so that one folder is enough, and `ft gc`
keeps it with CURRENT. Pure, no torch. Not here: the rule (champion.py), the scoring
(steps/release.py).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from ft_assets.artifacts import Artifact
from ft_assets.artifacts.documents import read_document, read_lines
from ft_assets.evaluation.drift_model import Drift
from ft_assets.evaluation.report_model import Difference, Part
from ft_assets.markdown import table

Status = Literal["PROMOTED", "KEPT", "ROLLED BACK", "PROPOSED", "REJECTED"]
PROMOTED: Literal["PROMOTED"] = "PROMOTED"
KEPT: Literal["KEPT"] = "KEPT"
ROLLED_BACK: Literal["ROLLED BACK"] = "ROLLED BACK"
PROPOSED: Literal["PROPOSED"] = "PROPOSED"  # a promotion or a rollback that awaits approval
REJECTED: Literal["REJECTED"] = "REJECTED"
DESCRIPTIONS = ("README.md", "verdict.json", "info/")  # files that do not change the answers
RESTORE = "restore the release from a backup, or materialize release again"
SHORT = 8  # characters of a fingerprint in a table


class ReleasedModel(Part):
    """A merged model in the register. identity: the hash of the files that decide its answers.

    merged_model: the fingerprint. override: the written reason of a release without a PASS.
    """

    identity: str
    merged_model: str
    data_version: str
    candidate: str
    verdict: str
    override: str | None = None

    @classmethod
    def of(cls, merged: Artifact) -> "ReleasedModel":
        """Describe a merged model."""
        return cls(
            identity=identity(merged),
            merged_model=merged.fingerprint,
            data_version=merged.data_version,
            candidate=merged.metrics["candidate"],
            verdict=merged.metrics["verdict"],
            override=merged.manifest.settings.get("override"),
        )


class Comparison(Part):
    """Champion and challenger on the rows that neither was trained on, by the gate's metric."""

    rows: int
    rows_the_champion_was_trained_on: int
    scores: dict[str, float]
    challenger_against_champion: Difference
    champion_against_base: Difference
    challenger_against_base: Difference
    # How the challenger's answers differ from the champion's; empty in an older register.
    drift: list[Drift] = Field(default=[])


class Decision(Part):
    """The decision of one release, and its reasons."""

    status: Status
    reasons: list[str]


class Approval(Part):
    """A person's decision on a proposal: who, when, what, and why.

    sequence, merged_model, identity: the number of the proposal and the model that it is about.
    by: how the name is known, e.g. a proxy's header.
    """

    sequence: int
    merged_model: str
    identity: str
    name: str
    reason: str
    at: str
    by: str


class HistoryEntry(Part):
    """One line of history.jsonl; a first release and a rollback do not have a comparison.

    champion: None while the first model awaits approval. proposes: what a proposal becomes when it
    is approved. approval: of the entry that ends a proposal.

    Keys of another version of ft_assets are kept: each release writes the history again.
    """

    model_config = ConfigDict(extra="allow")

    sequence: int
    decision: Status
    reasons: list[str]
    champion: ReleasedModel | None
    challenger: ReleasedModel
    at: str
    run_id: str
    comparison: Comparison | None = None
    proposes: Literal["PROMOTED", "ROLLED BACK"] | None = None
    approval: Approval | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON layout, without a comparison and an approval if there is none."""
        data = super().to_dict()
        for name in ("comparison", "proposes", "approval"):
            if data.get(name) is None:
                data.pop(name, None)
        return data

    @property
    def subject(self) -> ReleasedModel:
        """The model that a release is about: the champion, before the first one the proposed."""
        return self.champion or self.challenger


class ReleaseDocument(HistoryEntry):
    """release.json: the last decision, the champion before, and {identity: reason} of rollbacks."""

    previous: ReleasedModel | None
    withdrawn: dict[str, str]


class ReleaseState(Part):
    """The state before a decision; empty before the first release."""

    sequence: int = 0
    champion: ReleasedModel | None = None
    previous: ReleasedModel | None = None
    withdrawn: dict[str, str] = Field(default={})
    history: list[HistoryEntry] = Field(default=[])

    @property
    def proposal(self) -> HistoryEntry | None:
        """The proposal that nobody has decided yet: a later entry voids it."""
        last = self.history[-1] if self.history else None
        return last if last is not None and last.decision == PROPOSED else None


def identity(merged: Artifact) -> str:
    """Hash a merged model's weights, tokenizer, template and generation config.

    A new card does not make a new model.
    """
    files = {
        name: entry.sha256
        for name, entry in merged.manifest.files.items()
        if not name.startswith(DESCRIPTIONS)
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:20]


def state_of(release: Artifact | None) -> ReleaseState:
    """Read the state of a release; without one the empty state. Raises ArtifactError."""
    return ReleaseState() if release is None else read_state(release.path)


def read_state(folder: Path) -> ReleaseState:
    """Read the state in the folder of a release. Raises ArtifactError."""
    document = read_document(folder / "release.json", ReleaseDocument, RESTORE)
    return ReleaseState(
        sequence=document.sequence,
        champion=document.champion,
        previous=document.previous,
        withdrawn=document.withdrawn,
        history=read_lines(folder / "history.jsonl", HistoryEntry, RESTORE),
    )


def withdrawn_by(history: list[HistoryEntry]) -> dict[str, str]:
    """Return {identity: reason} of the models that a history has withdrawn.

    A rollback withdraws the champion that it replaces, and reinstates its target. A rejection
    withdraws the model that was proposed as champion.
    """
    found = dict[str, str]()
    for entry in history:
        if entry.decision == ROLLED_BACK and entry.champion is not None:
            found.pop(entry.champion.identity, None)
            found[entry.challenger.identity] = entry.reasons[0]
        if entry.decision == REJECTED and entry.proposes == PROMOTED:
            found[entry.challenger.identity] = entry.reasons[0]
    return found


def write_release(
    output: Path,
    before: ReleaseState,
    entry: HistoryEntry,
    withdrawn: dict[str, str] | None = None,
) -> None:
    """Write release.json, history.jsonl and release.md. withdrawn: None if it did not change."""
    old = before.champion
    new = entry.champion
    has_changed = old is not None and new is not None and old.identity != new.identity
    document = {
        **entry.to_dict(),
        "previous": _plain(old if has_changed else before.previous),
        "withdrawn": before.withdrawn if withdrawn is None else withdrawn,
    }
    history = [*before.history, entry]
    text = json.dumps(document, indent=1, ensure_ascii=False)
    (output / "release.json").write_text(text)
    (output / "history.jsonl").write_text(history_text(history))
    (output / "release.md").write_text(page(history))


def _drift(entry: HistoryEntry) -> list[str]:
    """Return how the answers of the challenger differ from the champion's, with examples."""
    lines: list[str] = []
    for drift in entry.comparison.drift if entry.comparison else []:
        lines += ["", f"Drift of answers, challenger against champion: {drift.sentence()}"]
        if drift.examples:
            rows = [[one.id, one.before, one.after] for one in drift.examples]
            lines += ["", table(["row", "champion", "challenger"], rows)]
    return lines


def history_text(history: list[HistoryEntry]) -> str:
    """Return the text of history.jsonl."""
    return "".join(json.dumps(line.to_dict(), ensure_ascii=False) + "\n" for line in history)


def entry_metrics(entry: HistoryEntry) -> dict[str, str | int]:
    """Return the metrics of a decision that was made without a comparison."""
    return {
        "decision": entry.decision,
        "reason": "; ".join(entry.reasons),
        "champion": entry.champion.merged_model if entry.champion else "",
        "sequence": entry.sequence,
        **({"proposed": entry.challenger.merged_model} if entry.decision == PROPOSED else {}),
    }


def gain_of(merged: Artifact) -> dict[str, Any]:
    """Return the gain of the merged file over the base, as the merge measured it."""
    metrics = merged.metrics
    return {
        "champion_gain_mean": metrics["merged_gain"],
        "champion_gain_low": metrics["merged_gain_low"],
        "champion_gain_high": metrics["merged_gain_high"],
        "champion_beats_base": metrics["merged_beats_base"],
    }


def _plain(model: ReleasedModel | None) -> dict[str, Any] | None:
    return model.to_dict() if model else None


def page(history: list[HistoryEntry]) -> str:
    """Write the release as a markdown page: the champion, the reasons, and the history."""
    last = history[-1]
    lines = [f"**{last.decision}**: {'; '.join(last.reasons)}", ""]
    if last.decision == PROPOSED:
        lines += [f"Proposed: {_about(last.challenger)}. It awaits approval.", ""]
    lines.append(f"Champion: {_about(last.champion) if last.champion else 'none yet'}")
    if last.champion and last.champion.override:
        reason = f"Reason given in gate.override: {last.champion.override}"
        lines += ["", f"> Released without a PASS. {reason}"]
    lines += _drift(last)
    header = ["#", "when (UTC)", "decision", "champion", "challenger", "why"]
    rows = [
        [
            str(line.sequence),
            line.at,
            line.decision,
            f"`{line.champion.merged_model[:SHORT]}`" if line.champion else "–",
            f"`{line.challenger.merged_model[:SHORT]}`",
            "; ".join(line.reasons),
        ]
        for line in reversed(history)
    ]
    return "\n".join([*lines, "", table(header, rows)]) + "\n"


def _about(model: ReleasedModel) -> str:
    return f"merged_model `{model.merged_model}` ({model.candidate}, verdict {model.verdict})"
