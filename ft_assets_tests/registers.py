"""A register of releases without a graph: decisions are published as the asset publishes them."""

from pathlib import Path

from ft_assets.artifacts import Artifact, ArtifactStore, fingerprint
from ft_assets.release.approval import now_text
from ft_assets.release.register import (
    PROMOTED,
    PROPOSED,
    ROLLED_BACK,
    HistoryEntry,
    ReleasedModel,
    entry_metrics,
    state_of,
    withdrawn_by,
    write_release,
)
from ft_assets.release.whole_register import current_release, turn

GAIN = {
    "merged_gain": 0.4,
    "merged_gain_low": 0.3,
    "merged_gain_high": 0.5,
    "merged_beats_base": True,
}


def merged_model(store: ArtifactStore, name: str, **metrics: float | str) -> ReleasedModel:
    """Publish a merged model of a few bytes and return its line of the register."""
    version = fingerprint("merged_model", "1", {}, {"adapter": name}, {})
    with store.staging("merged_model", "tiny") as staged:
        (staged / "model.safetensors").write_text(name)
        artifact = store.publish(
            staged,
            asset="merged_model",
            partition="tiny",
            version=version,
            code_version="1",
            settings={},
            inputs={"adapter": name},
            environment={},
            metrics={"candidate": name, "verdict": "PASS", **GAIN, **metrics},
            started=0.0,
        )
    return ReleasedModel.of(artifact)


def decide(
    store: ArtifactStore,
    champion: ReleasedModel,
    rolled_back: str | None = None,
    before: Artifact | None = None,
    held: bool = False,
) -> Artifact:
    """Publish a decision: a promotion, or a rollback with a reason.

    before: the release that it is compared with, by default the current one. held: it awaits
    approval.
    """
    before = before or current_release(store, "tiny")
    state = state_of(before)
    outcome = ROLLED_BACK if rolled_back else PROMOTED
    entry = HistoryEntry(
        sequence=state.sequence + 1,
        decision=PROPOSED if held else outcome,
        reasons=[rolled_back or "it is better"],
        champion=state.champion if held else champion,
        challenger=(state.champion or champion) if rolled_back and not held else champion,
        at=now_text(),
        run_id="r",
        proposes=outcome if held else None,
    )
    settings, inputs = entry.to_dict(), {"champion": entry.subject.data_version}
    if held:
        inputs["merged_model"] = champion.data_version
    with store.staging("release", "tiny") as staged:
        write_release(staged, state, entry, withdrawn_by([*state.history, entry]))
        return store.publish(
            staged,
            asset="release",
            partition="tiny",
            version=fingerprint("release", "1", settings, inputs, {}),
            code_version="1",
            settings=settings,
            inputs=inputs,
            environment={},
            metrics={**entry_metrics(entry), "measured_today": True},
            parts={"champion": entry.champion.identity if entry.champion else ""},
            started=0.0,
            turn=turn(store, "tiny", before, entry.sequence),
        )


def home(store: ArtifactStore) -> Path:
    """Return the folder of the register."""
    return store.root / "release/tiny"
