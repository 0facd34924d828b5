"""The asset `release`: champion and challenger.

Promotion and rollback are one materialization each. The release has the history of both.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import dagster as dg
from pydantic import Field, JsonValue

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.assets.eval_report import numbers
from ft_assets.assets.judged import TRAINED, judged, optional_stages
from ft_assets.config import GateSettings, Project, ReleaseSettings
from ft_assets.data.content import PRODUCTION
from ft_assets.errors import ArtifactError, ReleaseError, VerdictError
from ft_assets.evaluation.report_model import Estimate
from ft_assets.evaluation.setting_files import read_schema
from ft_assets.evaluation.verdict.gate import require_pass
from ft_assets.job import StepResult
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.links import versions_path
from ft_assets.orchestration.materializer import ERROR, WARN, Inputs, Materializer, Wanted, result
from ft_assets.release.approval import lapse, now_text, proposal_of
from ft_assets.release.champion import rollback_target
from ft_assets.release.lookup import (
    current_release,
    find_model,
    need_adapter,
    need_champion,
    need_model,
)
from ft_assets.release.register import (
    KEPT,
    PROMOTED,
    PROPOSED,
    ROLLED_BACK,
    HistoryEntry,
    ReleasedModel,
    ReleaseState,
    entry_metrics,
    gain_of,
    identity,
    state_of,
    write_release,
)
from ft_assets.release.signing import Signing, proven_release
from ft_assets.release.whole_register import turn
from ft_assets.steps import release as release_step

ABOVE = ("eval_report", "merged_model")
RULE = ("rule", "margin")
REQUIRED = "required"
LIBRARIES = "infer"
GATE = ("confidence", "metrics", "better", "min_heldout_rows", "min_graded_rows")


class ReleaseConfig(dg.Config):
    """The fields of the launchpad. All are empty in a usual run, which promotes by rule."""

    rollback_to: str = Field(
        default="",
        description="`previous`, or the fingerprint of a former champion's merged_model. Empty: "
        "promote by rule.",
    )
    reason: str = Field(
        default="",
        description="The reason of the rollback, in a sentence. It is recorded in the release. "
        "Required with rollback_to and vouch_for.",
    )
    vouch_for: str = Field(
        default="",
        description="The fingerprint of a merged_model that is not signed yet, and that you have "
        "checked. Needed once, when a project with releases begins or ends to sign.",
    )


def _summary(metrics: Metrics) -> str:
    if proposed := metrics.get("proposed"):
        return f"{PROPOSED}: merged_model {proposed[:8]} awaits approval"
    return f"{metrics['decision']}: merged_model {metrics['champion'][:8]}"


@asset(
    deps=[*TRAINED, *ABOVE],
    also=optional_stages,
    group="release",
    kinds=["huggingface"],
    code_version="2",
    gpu=True,
    summary=_summary,
)
def release(
    context: dg.AssetExecutionContext,
    materializer: dg.ResourceParam[Materializer],
    config: ReleaseConfig,
) -> dg.MaterializeResult:
    """The champion: the released model.

    Today's merged model replaces it if it beats the base and is not worse than the champion on
    today's held-out rows. To roll back, materialize this asset alone with `rollback_to: previous`
    and a `reason` in the launchpad.
    """
    where = f"release[{context.partition_key}]"
    _require_reason(config, where)
    signing = Signing.of(materializer.project, config.vouch_for or None, where)
    signing.require_chain(materializer.store, context.partition_key, where)
    if config.rollback_to:
        artifact, reused = _roll_back(context, materializer, config, signing)
    elif config.vouch_for:
        artifact, reused = _vouch(context, materializer, config, signing)
    else:
        artifact, reused = _release(context, materializer, signing)
    shown: dict[str, dg.MetadataValue] = {}
    if state_of(artifact).champion is not None:
        _, merged = need_champion(materializer.store, context.partition_key, where)
        shown["serve"] = dg.MetadataValue.path(str(merged.path))
    shown["versions"] = dg.MetadataValue.url(versions_path(context.partition_key))
    shown["history"] = dg.MetadataValue.md((artifact.path / "release.md").read_text())
    return result(artifact, reused, ("decision", "reason", "proposed", "champion"), **shown)


NOTHING = dg.AssetCheckResult(
    passed=False, severity=WARN, description="nothing is released yet: see awaits_approval"
)


@check(
    release,
    blocking=True,
    description="The released model beats its base on today's held-out rows.",
    fix="roll back to an earlier champion, or train a better model; ft release {base} "
    "shows the history",
)
def champion_beats_base(checked: Checked) -> dg.AssetCheckResult:
    """Fail if it does not.

    Only warn if it was not measured on today's rows (a rollback), or was released by override.
    """
    return _beats_base(checked)


@check(
    release,
    blocking=True,
    description="Every file of the released model is the one that was proven, byte for byte.",
    fix="restore the files from a backup, or roll back; ft verify names all that is damaged",
)
def released_files_are_whole(checked: Checked) -> dg.AssetCheckResult:
    """Fail with the first file that is missing or was changed."""
    store, name = checked.materializer.store, checked.name
    if state_of(checked.artifact).champion is None:
        return NOTHING
    try:
        proven = proven_release(checked.project, store, name, f"release[{name}]")
    except (ReleaseError, ArtifactError) as error:
        return dg.AssetCheckResult(passed=False, severity=ERROR, description=str(error))
    merged, signature = proven.champion, proven.signature
    files = merged.manifest.files
    size = merged.manifest.bytes
    by = f", signed with the key {signature.key.fingerprint[:12]}" if signature else ""
    return dg.AssetCheckResult(
        passed=True,
        description=f"{len(files)} files, {size / 1e9:.2f} GB, all as they were published{by}",
    )


@check(
    release,
    description="Today's merged model is the released one.",
)
def challenger_was_promoted(checked: Checked) -> dg.AssetCheckResult:
    """Warn, with the reason, if the champion was kept or rolled back to."""
    state = state_of(checked.artifact)
    merged = checked.materializer.store.need("merged_model", checked.name)
    last = state.history[-1]
    same = state.champion is not None and identity(merged) == state.champion.identity
    text = f"{last.decision}: {'; '.join(last.reasons)}"
    return dg.AssetCheckResult(passed=same, severity=WARN, description=text)


@check(
    release,
    description="No promotion or rollback awaits a person's approval.",
    only_if=lambda project: project.release.approval == REQUIRED,
)
def awaits_approval(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the proposal, and where to decide it."""
    found = proposal_of(checked.materializer.store, checked.name, checked.project.release)
    if found is None:
        return dg.AssetCheckResult(passed=True, description="nothing awaits approval")
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found.expires))
    lapsed = "lapsed at" if found.has_lapsed() else "lapses at"
    return dg.AssetCheckResult(
        passed=False,
        severity=WARN,
        description=f"{found.what} awaits approval since {found.entry.at} UTC, and {lapsed} "
        f"{until}: {'; '.join(found.entry.reasons)}",
        metadata={
            "decide": dg.MetadataValue.url("/ft/approval"),
            "version": found.model.merged_model,
        },
    )


def _release(
    context: dg.AssetExecutionContext, materializer: Materializer, signing: Signing
) -> tuple[Artifact, bool]:
    name, project, store = context.partition_key, materializer.project, materializer.store
    where = f"release[{name}]"
    used, versions = judged(materializer, "release", name)
    report = store.current("eval_report", name)
    require_pass(report, versions, project.gate, where, store.verified)
    assert report is not None
    merged = store.need("merged_model", name)
    _require_made_from(merged, report, where)
    current = current_release(store, name)
    state, challenger = state_of(current), ReleasedModel.of(merged)
    # Without approval, the identity is that of releases before there was any.
    rule = {*RULE, *(["approval"] if project.release.approval == REQUIRED else [])}
    settings = {
        "release": project.release.model_dump(mode="json", include=rule),
        "gate": project.gate.model_dump(mode="json", include=set(GATE)),
        "evaluation": versions["evaluation"],
    }
    inputs: dict[str, tuple[Artifact, str | None]] = {"merged_model": (merged, None)}
    signing.require_model(merged, state, where)
    sign = partial(signing.sign, store, name, current)
    lapsed = lapse(name, current, project.release)
    if current is not None and challenger.identity in state.withdrawn:
        why = f"it was withdrawn: {state.withdrawn[challenger.identity]}"
        return materializer.keep(context, current, ABOVE, why)
    if state.champion is None:
        sequence = _sequence(context, settings, inputs, None, current, lapsed)
        return materializer.materialize(
            context,
            identity={**settings, "sequence": sequence},
            inputs=inputs,
            make=lambda output: _first(
                output, state, merged, context, project, name, [lapsed] if lapsed else []
            ),
            finish=sign,
            turn=turn(store, name, current, sequence),
        )
    assert current is not None
    if challenger.identity == state.champion.identity:
        return materializer.keep(context, current, ABOVE, "today's merged model is the champion")
    champion = need_model(store, name, state.champion, where)
    inputs |= {
        "champion": (champion, None),
        "base_model": (used["base_model"], None),
        "eval_report": (report, None),
        "heldout_split#heldout": (used["heldout_split"], "heldout"),
        "champion_adapter": (need_adapter(store, name, champion, where), None),
        **_former(store, name, state),
    }
    evaluation = project.recipe(name).evaluation
    sequence = _sequence(context, settings, inputs, LIBRARIES, current, lapsed)
    return materializer.materialize(
        context,
        identity={**settings, "sequence": sequence},
        inputs=inputs,
        step=release_step.Settings(
            release=ReleaseSettings.model_validate(settings["release"]),
            gate=GateSettings.model_validate(settings["gate"]),
            evaluation=evaluation,
            answer_schema=read_schema(project, evaluation),
            root=project.root,
            state=state,
            challenger=challenger,
            lapsed=lapsed,
            at=now_text(),
            run_id=context.run_id,
            production=_production(materializer),
        ),
        finish=sign,
        libraries=LIBRARIES,
        turn=turn(store, name, current, sequence),
        unread=("previous_champion",),
    )


def _sequence(
    context: dg.AssetExecutionContext,
    settings: Mapping[str, JsonValue],
    inputs: Inputs,
    libraries: str | None,
    current: Artifact | None,
    lapsed: str | None,
) -> int:
    """Return the number of the decision that these inputs ask for.

    The same comparison again: the current decision is reused, unless it is a proposal that lapsed.
    Any other comparison gets a new number, so that an older decision, which has an older history,
    is not found.
    """
    before = state_of(current).sequence
    again = Wanted.of(context, {**settings, "sequence": before}, inputs, libraries).fingerprint
    same = current is not None and again == current.fingerprint and lapsed is None
    return before if same else before + 1


def _production(materializer: Materializer) -> Path | None:
    """Return the table of real prompts that both models answer, to tell how the answers drift."""
    raw = materializer.store.current("raw_dataset", None)
    if raw is None or not materializer.project.data.production:
        return None
    return raw.path / f"{PRODUCTION}.parquet"


def _former(
    store: ArtifactStore, name: str, state: ReleaseState
) -> dict[str, tuple[Artifact, str | None]]:
    """Return the champion before as an input: `ft gc` keeps it for a rollback."""
    previous = find_model(store, name, state.previous) if state.previous else None
    return {"previous_champion": (previous, None)} if previous else {}


def _require_made_from(merged: Artifact, report: Artifact, where: str) -> None:
    if merged.manifest.inputs["eval_report"] != report.data_version:
        raise VerdictError(
            where=where,
            found="merged_model was made from another eval_report than the current one",
            expected="the merged model of today's verdict",
            fix="materialize merged_model again",
        )


def _first(
    output: Path,
    state: ReleaseState,
    merged: Artifact,
    context: dg.AssetExecutionContext,
    project: Project,
    name: str,
    notes: Sequence[str],
) -> StepResult:
    gain, challenger = gain_of(merged), ReleasedModel.of(merged)
    metric = project.recipe(name).evaluation.metric
    held = project.release.approval == REQUIRED
    mean, low, high = (gain[f"champion_gain_{key}"] for key in ("mean", "low", "high"))
    found = f"{metric} {mean:+.3f} against base [{low:+.3f}, {high:+.3f}]"
    reasons = ["the first release: there is no champion to compare with"]
    better = gain["champion_beats_base"]
    proven = "it beats the base" if better else "it is not proven better than the base"
    reasons.append(f"{proven}: {found}")
    if challenger.override:
        reasons.append(f"released by override of {challenger.verdict}: {challenger.override}")
    entry = HistoryEntry(
        sequence=state.sequence + 1,
        decision=PROPOSED if held else PROMOTED,
        reasons=[*reasons, *notes],
        champion=None if held else challenger,
        challenger=challenger,
        at=now_text(),
        run_id=context.run_id,
        proposes=PROMOTED if held else None,
    )
    write_release(output, state, entry)
    return StepResult(
        {**entry_metrics(entry), **gain, "measured_today": True},
        {"champion": "" if held else challenger.identity},
    )


def _require_reason(config: ReleaseConfig, where: str) -> None:
    what = "a rollback" if config.rollback_to else "vouch_for"
    if (config.rollback_to or config.vouch_for) and not config.reason.strip():
        raise ReleaseError(
            where=where,
            found=f"{what} without a reason",
            expected="reason: a sentence, which is recorded",
            fix="fill in both fields of the launchpad",
        )


def _vouch(
    context: dg.AssetExecutionContext,
    materializer: Materializer,
    config: ReleaseConfig,
    signing: Signing,
) -> tuple[Artifact, bool]:
    """Keep the champion by a decision of its own, which is signed as the project is set today.

    A model that is not the champion goes the usual way instead.
    """
    name, store = context.partition_key, materializer.store
    where, current = f"release[{name}]", current_release(store, name)
    state = state_of(current)
    champion = state.champion
    if champion is None or champion.merged_model != config.vouch_for:
        merged = store.need("merged_model", name)
        if merged.fingerprint != config.vouch_for:
            raise ReleaseError(
                where=where,
                found=f"vouch_for: {config.vouch_for} is neither the champion nor today's merged "
                "model",
                expected="the whole fingerprint of one of them",
                fix=f"check {champion.merged_model if champion else merged.fingerprint}",
            )
        return _release(context, materializer, signing)
    model = need_model(store, name, champion, where)

    def make(output: Path) -> StepResult:
        entry = HistoryEntry(
            sequence=state.sequence + 1,
            decision=KEPT,
            reasons=[f"vouched for by hand: {config.reason}"],
            champion=champion,
            challenger=champion,
            at=now_text(),
            run_id=context.run_id,
        )
        write_release(output, state, entry)
        metrics = {**entry_metrics(entry), **gain_of(model), "measured_today": False}
        return StepResult(metrics, {"champion": champion.identity})

    return materializer.materialize(
        context,
        identity={
            "vouch_for": champion.identity,
            "reason": config.reason,
            "sequence": state.sequence + 1,
        },
        inputs={"champion": (model, None), **_former(store, name, state)},
        unread=("previous_champion",),
        make=make,
        finish=partial(signing.sign, store, name, current),
        turn=turn(store, name, current, state.sequence + 1),
    )


def _roll_back(
    context: dg.AssetExecutionContext,
    materializer: Materializer,
    config: ReleaseConfig,
    signing: Signing,
) -> tuple[Artifact, bool]:
    name, store = context.partition_key, materializer.store
    where, current = f"release[{name}]", current_release(store, name)
    state = state_of(current)
    target = rollback_target(state, config.rollback_to or "", where)
    champion = need_model(store, name, target, where)
    signing.require_model(champion, state, where)
    old = state.champion
    assert old is not None
    left = find_model(store, name, old)  # its files are not read: they may be the reason
    was = state.withdrawn.get(target.identity)
    reinstated = [] if was is None else [f"reinstates the model that was withdrawn: {was}"]
    withdrawn = {key: why for key, why in state.withdrawn.items() if key != target.identity}
    withdrawn[old.identity] = config.reason
    held = materializer.project.release.approval == REQUIRED
    former = find_model(store, name, state.previous) if held and state.previous else None

    def make(output: Path) -> StepResult:
        entry = HistoryEntry(
            sequence=state.sequence + 1,
            decision=PROPOSED if held else ROLLED_BACK,
            reasons=[config.reason, *reinstated],
            champion=old if held else target,
            challenger=target if held else old,
            at=now_text(),
            run_id=context.run_id,
            proposes=ROLLED_BACK if held else None,
        )
        write_release(output, state, entry, None if held else withdrawn)
        gain = gain_of(left if held and left else champion)
        metrics = {**entry_metrics(entry), **gain, "measured_today": False}
        return StepResult(metrics, {"champion": entry.subject.identity})

    settings = {
        **({"approval": REQUIRED} if held else {}),
        "rollback_to": target.identity,
        "reason": config.reason,
        "sequence": state.sequence + 1,
    }
    inputs: dict[str, tuple[Artifact, str | None]] = {"champion": (champion, None)}
    return materializer.materialize(
        context,
        identity=settings,
        inputs=inputs
        | ({"previous_champion": (left, None)} if left else {})
        | ({"former_champion": (former, None)} if former else {}),
        unread=("previous_champion", "former_champion"),
        make=make,
        finish=partial(signing.sign, store, name, current),
        turn=turn(store, name, current, state.sequence + 1),
    )


def _beats_base(checked: Checked) -> dg.AssetCheckResult:
    released = checked.artifact
    merged = checked.materializer.store.current("merged_model", checked.name)
    champion = state_of(released).champion
    if champion is None:
        return NOTHING
    metrics = dict(released.metrics)
    today = merged is not None and identity(merged) == champion.identity
    if today and merged is not None:  # made again for today's rows, with the same weights
        metrics |= gain_of(merged)
    measured = today or metrics["measured_today"]
    gain = Estimate(
        mean=metrics["champion_gain_mean"],
        low=metrics["champion_gain_low"],
        high=metrics["champion_gain_high"],
    )
    passed = bool(metrics["champion_beats_base"]) and measured
    metric = checked.project.recipe(checked.name).evaluation.metric
    text = f"{metric} {gain.mean:+.3f} against base [{gain.low:+.3f}, {gain.high:+.3f}]"
    if not measured:
        text += "; measured when it was merged, not on today's rows: it was rolled back to"
    if champion.override:
        text += f"; released by override: {champion.override}"
    lenient = not measured or champion.override
    return dg.AssetCheckResult(
        passed=passed, severity=WARN if lenient else ERROR, description=text, metadata=numbers(gain)
    )
