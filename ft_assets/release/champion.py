"""The rule of a release: whether a challenger replaces the champion, and the target of a rollback.

Pure, no torch. Not here: the register (register.py), the scoring (steps/release.py).
"""

from dataclasses import dataclass

from ft_assets.config import GateSettings, ReleaseSettings
from ft_assets.errors import ReleaseError
from ft_assets.evaluation.report_model import Differences
from ft_assets.evaluation.verdict.decision import (
    adjusted_p,
    beats,
    margins,
    not_worse,
    quality,
    worse,
)
from ft_assets.release.register import (
    KEPT,
    PROMOTED,
    Decision,
    ReleasedModel,
    ReleaseState,
)

CHAMPION = "the champion"


@dataclass(frozen=True)
class Measured:
    """The paired differences by metric, all on the same rows.

    against: of the challenger to the champion. champion, challenger: of each to the base.
    """

    against: Differences
    champion: Differences
    challenger: Differences


def beats_base(against_base: Differences, metric: str, gate: GateSettings) -> tuple[bool, str]:
    """Apply the gate's rules for the metrics; return True if the model passes, and the reasons."""
    adjusted = adjusted_p({"model": against_base}, metric, gate)["model"]
    found = quality(against_base, metric, gate, adjusted)
    return found.passed, "; ".join(found.decisive)


def decide_release(
    measured: Measured,
    metric: str,
    gate: GateSettings,
    rule: ReleaseSettings,
    override: str | None = None,
) -> Decision:
    """Decide whether a challenger replaces the champion.

    A challenger that does not beat the base on these rows is promoted only by `override`. If the
    rows cannot decide, the champion is kept, unless it no longer beats the base: then a challenger
    that beats it, and is not proven worse than the champion, replaces it.
    """
    decision = _against_champion(measured, metric, gate, rule)
    if decision.status != PROMOTED:
        return decision
    passed, found = beats_base(measured.challenger, metric, gate)
    if passed:
        return _promoted(*decision.reasons, f"on these rows the challenger is {found}")
    if override is None:
        return _kept(f"the challenger does not beat the base on these rows: {found}")
    why = f"on these rows it does not beat the base: {found}"
    return _promoted(*decision.reasons, f"released by override ({override}): {why}")


def _against_champion(
    measured: Measured, metric: str, gate: GateSettings, rule: ReleaseSettings
) -> Decision:
    """Decide by the differences to the champion, and the champion's to the base."""
    entry = measured.against[metric]
    text = entry.describe(metric, CHAMPION)
    if worse(entry, gate.confidence):
        return _kept(f"the challenger is worse than the champion: {text}")
    kept = margins(measured.against, metric, gate, CHAMPION)
    if not kept.passed:
        return _kept(*kept.decisive)
    passed, found = beats_base(measured.champion, metric, gate)
    if not passed:
        return _promoted(
            f"the champion no longer beats the base: {found}",
            f"the challenger is not proven worse than it: {text}",
        )
    if beats(entry, gate.confidence):
        return _promoted(f"the challenger is better than the champion: {text}")
    if rule.rule == "better":
        why = "the challenger is not proven better than the champion, as release.rule requires"
        return _kept(f"{why}: {text}")
    if not_worse(entry, rule.margin):
        return _promoted(f"the challenger is not worse than the champion by {rule.margin}: {text}")
    needed = f"; about {entry.rows_needed} held-out rows would decide" if entry.rows_needed else ""
    why = f"the challenger may be worse than the champion by more than {rule.margin}"
    return _kept(f"{why}: {text}{needed}")


def _kept(*reasons: str) -> Decision:
    return Decision(status=KEPT, reasons=list(reasons))


def _promoted(*reasons: str) -> Decision:
    return Decision(status=PROMOTED, reasons=list(reasons))


def rollback_target(state: ReleaseState, wanted: str, where: str) -> ReleasedModel:
    """Find a former champion by `previous`, or by the beginning of its fingerprint.

    `previous` never reinstates a withdrawn model: a second rollback would undo the first one.
    Raises ReleaseError if there is not exactly one.
    """
    if state.champion is None:
        raise ReleaseError(
            where=where,
            found="nothing was released yet",
            expected="a champion to roll back",
            fix="materialize release first",
        )
    if wanted == "previous":
        if state.previous is None:
            raise ReleaseError(
                where=where,
                found="there is no champion before this one",
                expected="a release with a former champion",
                fix="keep this champion: it is the first one",
            )
        withdrawn = state.withdrawn.get(state.previous.identity)
        if withdrawn is not None:
            raise ReleaseError(
                where=where,
                found=f"the champion before this one was withdrawn: {withdrawn}",
                expected="`previous` that was not withdrawn, or a fingerprint",
                fix=f"to reinstate it, set rollback_to: {state.previous.merged_model}",
            )
        return state.previous
    current = state.champion.identity
    champions = [line.champion for line in state.history if line.champion is not None]
    known = {model.merged_model: model for model in champions}
    former = {name: model for name, model in known.items() if model.identity != current}
    found = [model for name, model in former.items() if name.startswith(wanted)]
    if len(found) != 1:
        raise ReleaseError(
            where=where,
            found=f"rollback_to: {wanted} matches {len(found)} former champions",
            expected="`previous`, or the fingerprint of one former champion",
            fix=f"there are: {', '.join(sorted(former)) or 'none'}",
        )
    return found[0]
