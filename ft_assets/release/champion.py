"""Champion and challenger: which merged model of a base is released, decided by rule, with its history. Pure, no torch.

The state is `release.json` of the current `release` artifact, the history `history.jsonl` beside it: each decision holds
the whole history, so that one folder tells all, and `ft gc` keeps it with CURRENT. Not here: the scoring (steps/release.py).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_assets.artifacts import Artifact
from ft_assets.config import GateSettings, ReleaseSettings
from ft_assets.errors import ReleaseError
from ft_assets.evaluation.report_model import Differences
from ft_assets.evaluation.verdict.decision import adjusted_p, beats, goals, quality, worse

PROMOTED, KEPT, ROLLED_BACK = "PROMOTED", "KEPT", "ROLLED BACK"
ABOUT = ("README.md", "verdict.json", "info/")  # what is said of a model, not what answers
Model = dict[str, Any]


def identity(merged: Artifact) -> str:
    """Return what a merged model *is*: the hash of its weights, tokenizer, template and generation config. A new card is no
    new model."""
    files = {
        name: entry.sha256
        for name, entry in merged.manifest.files.items()
        if not name.startswith(ABOUT)
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:20]


def describe(merged: Artifact) -> Model:
    """Return what the release remembers of a model."""
    return {
        "identity": identity(merged),
        "merged_model": merged.fingerprint,
        "data_version": merged.data_version,
        "candidate": merged.metrics["candidate"],
        "verdict": merged.metrics["verdict"],
        "override": merged.manifest.settings.get("override"),
    }


@dataclass(frozen=True)
class State:
    """What is released now, what before it, and which models were withdrawn by a rollback ({identity: reason})."""

    sequence: int = 0
    champion: Model | None = None
    previous: Model | None = None
    withdrawn: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def state_of(release: Artifact | None) -> State:
    """Return the state that a release artifact holds; an empty one where there is none."""
    if release is None:
        return State()
    said_ = json.loads((release.path / "release.json").read_text())
    history = [
        json.loads(line) for line in (release.path / "history.jsonl").read_text().splitlines()
    ]
    return State(
        said_["sequence"], said_["champion"], said_["previous"], said_["withdrawn"], history
    )


@dataclass(frozen=True)
class Decision:
    """PROMOTED, KEPT or ROLLED BACK, and why, in sentences."""

    status: str
    reasons: list[str]


def stands(against_base: Differences, metric: str, gate: GateSettings) -> tuple[bool, str]:
    """Return whether a model is better than its base on these rows by what the gate asks of the metrics, and what was found."""
    found = quality(
        against_base, metric, gate, adjusted_p({"it": against_base}, metric, gate)["it"]
    )
    return found.passed, "; ".join(found.decisive)


def decide_release(
    against: Differences,
    champion_today: Differences,
    challenger_today: Differences,
    metric: str,
    gate: GateSettings,
    rule: ReleaseSettings,
    override: str | None = None,
) -> Decision:
    """Return whether a challenger replaces the champion.

    All differences are paired, by metric, on the very same rows. against: the challenger's to the champion. champion_today,
    challenger_today: each one's to the base. A challenger that does not beat the base on them is promoted by `override`
    alone. What cannot be told keeps the champion, unless the champion itself no longer beats the base: then a challenger
    that does, and is not proven worse, replaces it.
    """
    decision = _against_champion(against, champion_today, metric, gate, rule)
    holds, found = stands(challenger_today, metric, gate)
    if decision.status != PROMOTED or holds:
        return Decision(
            decision.status,
            [
                *decision.reasons,
                *(
                    [f"on these rows the challenger is {found}"]
                    if decision.status == PROMOTED
                    else []
                ),
            ],
        )
    if override is None:
        return Decision(KEPT, [f"the challenger does not beat the base on these rows: {found}"])
    return Decision(
        PROMOTED,
        [
            *decision.reasons,
            f"released by override ({override}): on these rows it does not beat the base: {found}",
        ],
    )


def _against_champion(
    against: Differences,
    champion_today: Differences,
    metric: str,
    gate: GateSettings,
    rule: ReleaseSettings,
) -> Decision:
    entry = against[metric]
    text = entry.describe(metric, "the champion")
    if worse(entry, gate.confidence):
        return Decision(KEPT, [f"the challenger is worse than the champion: {text}"])
    broken = [
        f"it may be worse than the champion by more than {margin}: {against[name].describe(name, 'the champion')}"
        for name, margin in goals(metric, gate).items()
        if margin != "better" and against[name].low <= -margin
    ]
    if broken:
        return Decision(KEPT, broken)
    holds, found = stands(champion_today, metric, gate)
    if not holds:
        return Decision(
            PROMOTED,
            [
                f"the champion no longer beats the base: {found}",
                f"the challenger is not proven worse than it: {text}",
            ],
        )
    if beats(entry, gate.confidence):
        return Decision(PROMOTED, [f"the challenger is better than the champion: {text}"])
    if rule.rule == "better":
        return Decision(
            KEPT,
            [
                f"the challenger is not proven better than the champion, which release.rule asks for: {text}"
            ],
        )
    if entry.low > -rule.margin or entry.wins == entry.losses == 0:
        return Decision(
            PROMOTED, [f"the challenger is not worse than the champion by {rule.margin}: {text}"]
        )
    needed = f"; about {entry.rows_needed} held-out rows would decide" if entry.rows_needed else ""
    return Decision(
        KEPT,
        [
            f"the challenger may be worse than the champion by more than {rule.margin}: {text}{needed}"
        ],
    )


def rollback_target(state: State, wanted: str, where: str) -> Model:
    """Return the former champion that `wanted` names: `previous`, or the beginning of its fingerprint. Raises ReleaseError."""
    if state.champion is None:
        raise ReleaseError(
            where=where,
            found="nothing was released yet",
            expected="a champion to roll back",
            fix="materialize release first",
        )
    current = state.champion["identity"]
    known = {line["champion"]["merged_model"]: line["champion"] for line in state.history}
    former = {name: model for name, model in known.items() if model["identity"] != current}
    if wanted == "previous":
        if state.previous is None:
            raise ReleaseError(
                where=where,
                found="there is no champion before this one",
                expected="a release with a history",
                fix="nothing to roll back to",
            )
        return state.previous
    found = [model for name, model in former.items() if name.startswith(wanted)]
    if len(found) != 1:
        choices = ", ".join(sorted(former)) or "none"
        raise ReleaseError(
            where=where,
            found=f"rollback_to: {wanted} names {len(found)} former champions",
            expected="`previous`, or the fingerprint of one",
            fix=f"there are: {choices}",
        )
    return found[0]


def write_release(
    output: Path,
    before: State,
    decision: Decision,
    champion: Model,
    challenger: Model,
    extra: Mapping[str, Any],
) -> None:
    """Write release.json, history.jsonl and release.md. `extra`: at, run_id, comparison, …, withdrawn if it changed."""
    changed = before.champion is not None and before.champion["identity"] != champion["identity"]
    entry = {
        "sequence": before.sequence + 1,
        "decision": decision.status,
        "reasons": decision.reasons,
        "champion": champion,
        "challenger": challenger,
        **{key: value for key, value in extra.items() if key != "withdrawn"},
    }
    document = {
        **entry,
        "previous": before.champion if changed else before.previous,
        "withdrawn": extra.get("withdrawn", before.withdrawn),
    }
    history = [*before.history, entry]
    (output / "release.json").write_text(json.dumps(document, indent=1, ensure_ascii=False))
    (output / "history.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in history)
    )
    (output / "release.md").write_text(page(document, history))


def page(document: Mapping[str, Any], history: list[dict[str, Any]]) -> str:
    """Return the release for a person: what is released, why, and what was before."""
    champion = document["champion"]
    lines = [f"**{document['decision']}**: {'; '.join(document['reasons'])}", ""]
    lines += [
        f"Champion: merged_model `{champion['merged_model']}` ({champion['candidate']}, verdict {champion['verdict']})"
    ]
    if champion["override"]:
        lines += [
            "",
            f"> Released without a PASS. Reason given in gate.override: {champion['override']}",
        ]
    lines += [
        "",
        "| # | when (UTC) | decision | champion | challenger | why |",
        "|---|---|---|---|---|---|",
    ]
    for line in reversed(history):
        why = "; ".join(line["reasons"]).replace("|", "\\|").replace("\n", " ")
        models = (
            f"`{line['champion']['merged_model'][:8]}` | `{line['challenger']['merged_model'][:8]}`"
        )
        lines.append(
            f"| {line['sequence']} | {line['at']} | {line['decision']} | {models} | {why} |"
        )
    return "\n".join(lines) + "\n"
