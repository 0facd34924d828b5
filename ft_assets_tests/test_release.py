"""Champion and challenger: promotion by rule, rollback and refusals, in a finished project."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.artifacts.manifest import Manifest
from ft_assets.commands.gc import removals, remove
from ft_assets.config import GateSettings, ReleaseSettings
from ft_assets.errors import ArtifactError, ReleaseError
from ft_assets.evaluation.report_model import Difference
from ft_assets.orchestration import materializer as materializer
from ft_assets.release.champion import Measured, decide_release
from ft_assets.release.lookup import adapter_of
from ft_assets.release.register import (
    KEPT,
    PROMOTED,
    HistoryEntry,
    ReleaseState,
    state_of,
    write_release,
)
from ft_assets.steps.release import require_enough
from ft_assets_tests.factories import edit, ft
from ft_assets_tests.pipeline import artifact, checks, failure, materialize

UP_TO_RELEASE = "recipe,lora_adapter,dpo_adapter,answers,eval_report,merged_model,release"
ROLL_BACK = {"release": {"rollback_to": "previous", "reason": "customers complained"}}


def state(folder: Path) -> ReleaseState:
    return state_of(ArtifactStore(folder / ".ft/store").need("release", "tiny"))


def champion(folder: Path) -> str:
    found = state(folder).champion
    assert found is not None
    return found.merged_model


def difference(
    mean: float, low: float, high: float, p: float, wins: int = 9, losses: int = 5
) -> Difference:
    return Difference(
        mean=mean,
        low=low,
        high=high,
        p=p,
        wins=wins,
        losses=losses,
        ties=64 - wins - losses,
        n=64,
        test="permutation",
        rows_needed=400,
        detectable=0.1,
    )


GOOD, NO_BETTER = difference(0.4, 0.3, 0.5, 0.0001), difference(0.0, -0.1, 0.1, 1.0)
RULES = [
    ("better", difference(0.2, 0.1, 0.3, 0.001), GOOD, {}, PROMOTED, "is better than the champion"),
    ("worse", difference(-0.2, -0.3, -0.1, 0.001), GOOD, {}, KEPT, "is worse than the champion"),
    (
        "cannot tell",
        difference(0.01, -0.1, 0.12, 0.8),
        GOOD,
        {},
        KEPT,
        "may be worse than the champion by more than 0.05",
    ),
    (
        "not worse by the margin",
        difference(0.01, -0.04, 0.06, 0.8),
        GOOD,
        {},
        PROMOTED,
        "not worse than the champion by 0.05",
    ),
    (
        "a wider margin",
        difference(0.01, -0.1, 0.12, 0.8),
        GOOD,
        {"margin": 0.2},
        PROMOTED,
        "not worse than the champion by 0.2",
    ),
    (
        "must be better",
        difference(0.01, -0.04, 0.06, 0.8),
        GOOD,
        {"rule": "better"},
        KEPT,
        "not proven better",
    ),
    (
        "no row differs, and the rows are too few to show it",
        difference(0.0, -0.06, 0.06, 1.0, 0, 0),
        GOOD,
        {},
        KEPT,
        "may be worse than the champion by more than 0.05",
    ),
    (
        "the champion fell behind the base",
        difference(0.01, -0.1, 0.12, 0.8),
        NO_BETTER,
        {},
        PROMOTED,
        "no longer beats",
    ),
    (
        "worse than a champion that fell behind",
        difference(-0.2, -0.3, -0.1, 0.001),
        NO_BETTER,
        {},
        KEPT,
        "is worse",
    ),
]


@pytest.mark.parametrize(
    ("against", "today", "rule", "status", "says"),
    [case[1:] for case in RULES],
    ids=[case[0] for case in RULES],
)
def test_rule(against: Difference, today: Difference, rule: dict, status: str, says: str) -> None:
    decision = decide_release(
        Measured({"exact": against}, {"exact": today}, {"exact": GOOD}),
        "exact",
        GateSettings(),
        ReleaseSettings(**rule),
    )
    assert decision.status == status
    assert says in decision.reasons[0]
    promised = (
        "on these rows the challenger is better than the base: "
        "exact +0.400 against base [+0.300, +0.500]"
    )
    assert (promised in decision.reasons[-1]) == (status == PROMOTED)


@pytest.mark.parametrize(
    "today", [GOOD, NO_BETTER], ids=["champion beats the base", "champion fell behind"]
)
def test_challenger_that_does_not_beat_the_base_on_these_rows_is_promoted_by_override_alone(
    today: Difference,
) -> None:
    """The champion may have been trained on most rows; the PASS is not about the remaining ones."""
    better = {"exact": difference(0.2, 0.1, 0.3, 0.001)}
    asked = (
        Measured(better, {"exact": today}, {"exact": NO_BETTER}),
        "exact",
        GateSettings(),
        ReleaseSettings(),
    )
    decision = decide_release(*asked)
    assert decision.status == KEPT
    undecided = "cannot tell it from the base: exact +0.000 against base"
    assert f"does not beat the base on these rows: {undecided}" in decision.reasons[0]
    decision = decide_release(*asked, override="the board wants it")
    assert decision.status == PROMOTED
    assert (
        "released by override (the board wants it): on these rows it does not beat the base"
        in decision.reasons[-1]
    )


def test_margin_alone_is_what_beats_the_base_where_the_gate_asks_no_more() -> None:
    gate, slightly_lower = (
        GateSettings(metrics={"exact": 0.2}),
        {"exact": difference(-0.05, -0.1, 0.0, 0.2)},
    )
    decision = decide_release(
        Measured({"exact": difference(0.0, -0.04, 0.04, 1.0)}, slightly_lower, slightly_lower),
        "exact",
        gate,
        ReleaseSettings(),
    )
    assert decision.status == PROMOTED
    assert "not worse than the champion by 0.05" in decision.reasons[0]


def test_margin_of_the_gate_holds_against_the_champion_too() -> None:
    gate = GateSettings(metrics={"exact": "better", "chrf": 0.1})
    against = {"exact": difference(0.2, 0.1, 0.3, 0.001), "chrf": difference(-0.05, -0.2, 0.1, 0.4)}
    decision = decide_release(
        Measured(against, {"exact": GOOD, "chrf": GOOD}, {"exact": GOOD, "chrf": GOOD}),
        "exact",
        gate,
        ReleaseSettings(),
    )
    assert decision.status == KEPT
    assert "worse than the champion by more than 0.1: chrf" in decision.reasons[0]


def test_rows_of_few_groups_are_too_few_for_a_comparison() -> None:
    rows: list[Any] = [
        {"id": f"row{index}", "group": f"row{index}", "cluster": f"{index % 5}"}
        for index in range(40)
    ]
    with pytest.raises(ReleaseError, match="40 rows in 5 groups are left"):
        require_enough(rows, 60, GateSettings(), "release[tiny]")
    require_enough(rows, 60, GateSettings(min_heldout_rows=5), "release[tiny]")


MODEL = {
    "identity": "12c3",
    "merged_model": "6a73",
    "data_version": "2945",
    "candidate": "dpo",
    "verdict": "PASS",
    "override": None,
}
FIRST = {
    "sequence": 1,
    "decision": PROMOTED,
    "reasons": ["the first release"],
    "champion": MODEL,
    "challenger": MODEL,
    "at": "2026-11-27 14:12:48",
    "run_id": "123b",
}


def test_register_keeps_the_layout_and_the_keys_of_other_versions(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    line = {**FIRST, "later_key": 1}
    document = {**line, "previous": None, "withdrawn": {}}
    (old / "release.json").write_text(json.dumps(document))
    (old / "history.jsonl").write_text(json.dumps(line) + "\n")
    before = state_of(Artifact(old, {}))
    entry = HistoryEntry.model_validate({**FIRST, "sequence": 2, "decision": KEPT})
    through_a_job = ReleaseState.model_validate_json(before.model_dump_json())
    write_release(new, through_a_job, entry)
    lines = (new / "history.jsonl").read_text().splitlines()
    assert lines[0] == json.dumps(line)  # byte for byte
    assert lines[1] == json.dumps({**FIRST, "sequence": 2, "decision": KEPT})
    written = (new / "release.json").read_text()
    last = {**FIRST, "sequence": 2, "decision": KEPT, "previous": None, "withdrawn": {}}
    assert written == json.dumps(last, indent=1)


def test_damaged_register_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    model = {key: value for key, value in MODEL.items() if key != "identity"}
    document = {**FIRST, "champion": model, "previous": None, "withdrawn": {}}
    (tmp_path / "release.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"release.json: is damaged .*champion.identity: Field"):
        state_of(Artifact(tmp_path, {}))


def test_first_release_has_no_champion_to_beat_and_a_rerun_does_nothing(copy: Path) -> None:
    first = artifact(copy, "release")
    only = state(copy)
    assert [line.decision for line in only.history] == [PROMOTED]
    assert only.previous is None
    assert champion(copy) == artifact(copy, "merged_model").name
    result = materialize(copy, "release")
    assert result.success, failure(result)
    assert artifact(copy, "release") == first
    assert all(check.passed for check in checks(result).values())

    # Without the pointer, this is not a first release again.
    pointer = copy / ".ft/store/release/tiny/CURRENT"
    pointer.unlink()
    said = failure(materialize(copy, "release"))
    assert "the register is not whole: CURRENT is missing, but decision 1 was made" in said
    repaired = ft(copy, "release", "--repair")
    assert repaired.returncode == 0
    assert "CURRENT now names version" in repaired.stderr
    assert artifact(copy, "release") == first


def test_challenger_is_promoted_rolled_back_and_stays_withdrawn(copy: Path) -> None:
    first = champion(copy)
    edit(
        copy, sft={"learning_rate": 0.021}, release={"margin": 0.5}
    )  # wide: a row or two that flip decide nothing
    result = materialize(copy, UP_TO_RELEASE)
    assert result.success, failure(result)
    second = artifact(copy, "merged_model").name
    after = state(copy)
    assert second != first
    comparison = after.history[-1].comparison
    assert comparison is not None
    assert (
        comparison.rows == 35
    )  # the champion answered today's rows again, and so did the challenger
    assert set(comparison.scores) == {"champion", "challenger"}
    drifts = [(drift.prompts, drift.rows) for drift in comparison.drift]
    assert drifts == [("held-out", 35)]
    page = (artifact(copy, "release") / "release.md").read_text()
    assert "of the answers to 35 held-out prompts changed" in page
    assert comparison.challenger_against_base.mean > 0
    assert [line.decision for line in after.history] == [PROMOTED, PROMOTED]
    assert champion(copy) == second

    # ft gc with nothing kept but the newest leaves what a rollback needs
    store = ArtifactStore(copy / ".ft/store")
    going, _ = removals(store, 1, now=time.time() + 7 * 24 * 3600)
    assert going
    for removal in going:
        remove(store, removal)
    assert store.find("merged_model", "tiny", first) is not None
    assert len(state(copy).history) == 2

    refused = materialize(copy, "release", config={"release": {"rollback_to": "previous"}})
    assert "a rollback without a reason" in failure(refused)
    refused = materialize(
        copy, "release", config={"release": {"rollback_to": "ffff", "reason": "x"}}
    )
    assert f"there are: {first}" in failure(refused)
    assert champion(copy) == second

    rolled = materialize(copy, "release", config=ROLL_BACK)
    assert rolled.success, failure(rolled)
    assert champion(copy) == first
    assert state(copy).history[-1].decision == "ROLLED BACK"
    assert "not on today's rows" in (checks(rolled)["champion_beats_base"].description or "")
    assert not checks(rolled)["challenger_was_promoted"].passed

    back = artifact(copy, "release")
    again = materialize(copy, UP_TO_RELEASE)  # the schedule, a week later
    assert again.success, failure(again)
    assert artifact(copy, "release") == back
    assert champion(copy) == first
    assert "customers complained" in (checks(again)["challenger_was_promoted"].description or "")

    forward = materialize(
        copy,
        "release",
        config={"release": {"rollback_to": second[:8], "reason": "it was not the model"}},
    )
    assert forward.success, failure(forward)
    assert champion(copy) == second
    previous = state(copy).previous
    assert previous is not None
    assert state(copy).withdrawn == {previous.identity: "it was not the model"}


def test_champion_that_was_kept_is_asked_again_when_a_library_changes(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = champion(copy)
    edit(copy, sft={"learning_rate": 0.021}, release={"rule": "better"})
    assert materialize(copy, UP_TO_RELEASE).success
    assert [line.decision for line in state(copy).history] == [PROMOTED, KEPT]
    kept = artifact(copy, "release")
    assert materialize(copy, "release").success
    assert artifact(copy, "release") == kept  # nothing changed: the same answer
    real = materializer.library_versions
    monkeypatch.setattr(
        materializer, "library_versions", lambda kind: real(kind) | {"torch": "99.0"}
    )
    result = materialize(copy, "release")
    assert result.success, failure(result)
    after = state(copy)
    assert [(line.sequence, line.decision) for line in after.history] == [
        (1, PROMOTED),
        (2, KEPT),
        (3, KEPT),
    ]
    assert champion(copy) == first


def test_first_release_by_override_says_so(copy: Path) -> None:
    shutil.rmtree(copy / ".ft/store/release")
    edit(copy, gate={"min_heldout_rows": 1000, "override": "the board wants it"})
    result = materialize(copy, "eval_report,merged_model,release")
    assert result.success, failure(result)
    reasons = state(copy).history[0].reasons
    gain = ArtifactStore(copy / ".ft/store").need("merged_model", "tiny").metrics["merged_gain"]
    assert f"it beats the base: exact {gain:+.3f} against base [" in reasons[1]
    assert reasons[2] == "released by override of INCONCLUSIVE: the board wants it"


def test_first_release_of_a_file_that_does_not_beat_the_base_does_not_say_that_it_does(
    copy: Path,
) -> None:
    shutil.rmtree(copy / ".ft/store/release")
    manifest = artifact(copy, "merged_model") / "manifest.json"
    told = Manifest.read(manifest.parent)
    lower = {
        "merged_beats_base": False,
        "merged_gain": 0.0,
        "merged_gain_low": -0.1,
        "merged_gain_high": 0.1,
    }
    measured = told.model_copy(update={"metrics": {**told.metrics, **lower}})
    manifest.write_text(measured.sealed().to_text())
    materialize(copy, "release")
    reasons = "; ".join(state(copy).history[0].reasons)
    assert "it beats the base" not in reasons
    assert (
        "it is not proven better than the base: exact +0.000 against base [-0.100, +0.100]"
        in reasons
    )


def test_no_comparison_with_a_champion_whose_trained_rows_nobody_knows(copy: Path) -> None:
    store = ArtifactStore(copy / ".ft/store")
    adapter = adapter_of(store, "tiny", store.need("merged_model", "tiny"))
    assert adapter is not None
    before = champion(copy)
    edit(copy, sft={"learning_rate": 0.021})
    assert materialize(copy, UP_TO_RELEASE.removesuffix(",release")).success
    (adapter.path / "trained_groups.json").unlink()
    said = failure(materialize(copy, "release"))
    assert "trained_groups.json: is missing" in said
    assert "the file of the manifest" in said
    shutil.rmtree(adapter.path)
    said = failure(materialize(copy, "release"))
    assert "the adapter of the champion" in said
    assert "so its training rows are unknown" in said
    assert champion(copy) == before


def test_release_alone_is_refused_without_a_pass_for_these_versions(copy: Path) -> None:
    edit(copy, evaluation={"max_new_tokens": 1})
    materialize(copy, "answers,eval_report")
    before = champion(copy)
    result = materialize(copy, "release")
    assert not result.success
    assert "the verdict is FAIL" in failure(result)
    assert champion(copy) == before


def test_merged_model_of_another_report_is_not_released(copy: Path) -> None:
    edit(copy, evaluation={"max_new_tokens": 7})
    assert materialize(copy, "answers,eval_report").success
    assert "was made from another eval_report" in failure(materialize(copy, "release"))


def test_damaged_file_of_the_champion_is_found_and_never_released(copy: Path) -> None:
    weights = artifact(copy, "merged_model") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found = checks(materialize(copy, "release"))["released_files_are_whole"]
    assert not found.passed
    assert "model.safetensors: was changed after it was published" in str(found.description)
    shutil.rmtree(copy / ".ft/store/release")
    assert "model.safetensors: was changed" in failure(materialize(copy, "release"))
