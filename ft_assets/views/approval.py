"""What awaits a person's approval, and who decided what, for each base model."""

from collections.abc import Sequence
from dataclasses import dataclass

from ft_assets.artifacts import Artifact
from ft_assets.errors import FtError
from ft_assets.release.approval import Proposal, proposal_of
from ft_assets.release.lookup import by_content, find_model
from ft_assets.release.register import ROLLED_BACK, HistoryEntry, state_of
from ft_assets.release.whole_register import current_release
from ft_assets.views.board import Gain, Opened


@dataclass(frozen=True)
class Waiting:
    """A proposal. since, expires: seconds since 1970.

    against_base: its gain on today's rows, or as it was merged. report: the fingerprint of the
    eval_report that it was merged after.
    """

    what: str
    is_rollback: bool
    version: str
    since: float
    expires: float
    lapsed: bool
    verdict: str
    candidate: str
    reasons: Sequence[str]
    metric: str
    against_base: Gain | None
    report: str | None


@dataclass(frozen=True)
class Decided:
    """A line of the history, the newest first. who: of an answer to a proposal."""

    sequence: int
    at: str
    decision: str
    version: str
    why: str
    who: str | None


@dataclass(frozen=True)
class Approvals:
    """Of one base model. problem: why its register cannot be read."""

    base_model: str
    champion: str | None
    waiting: Waiting | None
    history: Sequence[Decided]
    problem: str | None = None


def approvals(opened: Opened) -> list[Approvals]:
    """Return the proposals and decisions of each base model of finetune.yaml."""
    return [_of(opened, name) for name in opened.project.base_models]


def _of(opened: Opened, name: str) -> Approvals:
    try:
        released = current_release(opened.store, name)
        state = state_of(released)
        found = proposal_of(opened.store, name, opened.project.release)
        waiting = None if found is None else _waiting(opened, found)
    except FtError as error:
        return Approvals(name, None, None, [], str(error))
    champion = state.champion.merged_model if state.champion else None
    history = [_decided(entry) for entry in reversed(state.history)]
    return Approvals(name, champion, waiting, history)


def _waiting(opened: Opened, found: Proposal) -> Waiting:
    model = find_model(opened.store, found.partition, found.model)
    version = model.manifest.inputs.get("eval_report", "") if model else ""
    report = by_content(opened.store, "eval_report", found.partition, version)
    return Waiting(
        what=found.what,
        is_rollback=found.entry.proposes == ROLLED_BACK,
        version=found.model.merged_model,
        since=found.since,
        expires=found.expires,
        lapsed=found.has_lapsed(),
        verdict=found.model.verdict,
        candidate=found.model.candidate,
        reasons=found.entry.reasons,
        metric=opened.project.recipe(found.partition).evaluation.metric,
        against_base=_gain(found.entry, model),
        report=report.fingerprint if report else None,
    )


def _gain(entry: HistoryEntry, model: Artifact | None) -> Gain | None:
    if entry.comparison is not None:
        found = entry.comparison.challenger_against_base
        return Gain(found.mean, found.low, found.high)
    if model is None:
        return None
    names = ("merged_gain", "merged_gain_low", "merged_gain_high")
    return Gain(*(model.metrics[name] for name in names))


def _decided(entry: HistoryEntry) -> Decided:
    return Decided(
        sequence=entry.sequence,
        at=entry.at,
        decision=entry.decision,
        version=entry.challenger.merged_model,
        why="; ".join(entry.reasons),
        who=f"{entry.approval.name} ({entry.approval.by})" if entry.approval else None,
    )
