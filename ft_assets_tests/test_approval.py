"""Approval: what is proposed is not released, and what is released is what was approved."""

import itertools
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from starlette.testclient import TestClient

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import Project, load_project
from ft_assets.errors import ArtifactError, ReleaseError
from ft_assets.orchestration import approval_reminder
from ft_assets.orchestration.alerts import Alert
from ft_assets.orchestration.approve_release import approve_release
from ft_assets.release import approval
from ft_assets.release.approval import Answer, answer, lapse, proposal_of
from ft_assets.release.lookup import need_champion
from ft_assets.release.register import (
    PROMOTED,
    PROPOSED,
    REJECTED,
    ROLLED_BACK,
    ReleaseState,
    state_of,
)
from ft_assets.release.whole_register import DECISIONS, current_release, repair
from ft_assets.ui.guard import Guard
from ft_assets.ui.pages.app import beside, declared, pages_app
from ft_assets_tests.factories import edit, ft
from ft_assets_tests.pipeline import failure
from ft_assets_tests.registers import decide, home, merged_model

DAY = 86_400.0


@pytest.fixture
def settings() -> Project:
    return Project.model_validate(
        {
            "base_models": {"tiny": {"folder": "model"}},
            "data": {"train": ["train.jsonl"]},
            "release": {"approval": "required"},
        }
    )


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def state(store: ArtifactStore) -> ReleaseState:
    return state_of(current_release(store, "tiny"))


def says(
    decision: str, version: str, name: str = "Ada", reason: str = "I read 20 answers"
) -> Answer:
    return Answer.model_validate(
        {"decision": decision, "version": version, "name": name, "reason": reason, "by": "test"}
    )


def serves(store: ArtifactStore) -> str | None:
    """Return the model that everything that reads a release gets, None if it is refused."""
    try:
        return need_champion(store, "tiny", "here")[1].fingerprint
    except ReleaseError:
        return None


def test_first_model_is_released_by_its_approval_alone_and_the_record_is_whole(
    settings: Project, store: ArtifactStore
) -> None:
    one = merged_model(store, "one")
    decide(store, one, held=True)
    with pytest.raises(ReleaseError, match="awaits approval") as error:
        need_champion(store, "tiny", "export[tiny]")
    assert f"--approve {one.merged_model}" in error.value.fix
    done = answer(settings, store, "tiny", says("approve", one.merged_model[:8]), "run7")
    assert serves(store) == one.merged_model
    assert done.metrics["champion_beats_base"] is True
    last = state(store).history[-1]
    assert (last.decision, last.run_id, last.sequence) == (PROMOTED, "run7", 2)
    assert last.approval is not None
    told = last.approval
    assert (told.name, told.reason, told.by) == ("Ada", "I read 20 answers", "test")
    assert (told.merged_model, told.identity, told.sequence) == (one.merged_model, one.identity, 1)
    assert "approved by Ada (test): I read 20 answers" in (done.path / "release.md").read_text()
    with pytest.raises(ReleaseError, match="nothing awaits approval"):
        answer(settings, store, "tiny", says("approve", one.merged_model), "")


def test_champion_stays_until_the_answer_and_a_rejected_model_is_withdrawn(
    settings: Project, store: ArtifactStore
) -> None:
    one, two = merged_model(store, "one"), merged_model(store, "two")
    decide(store, one)
    decide(store, two, held=True)
    assert serves(store) == one.merged_model
    answer(settings, store, "tiny", says("reject", two.merged_model, reason="it is rude"), "")
    assert serves(store) == one.merged_model
    after = state(store)
    assert after.history[-1].decision == REJECTED
    assert after.withdrawn == {two.identity: "rejected by Ada (test): it is rude"}


def test_rollback_waits_and_its_own_reason_withdraws_the_model(
    settings: Project, store: ArtifactStore
) -> None:
    one, two = merged_model(store, "one"), merged_model(store, "two")
    decide(store, one)
    decide(store, two)
    decide(store, one, "it swears", held=True)
    assert serves(store) == two.merged_model
    assert state(store).withdrawn == {}
    answer(settings, store, "tiny", says("approve", one.merged_model), "")
    assert serves(store) == one.merged_model
    after = state(store)
    assert after.history[-1].decision == ROLLED_BACK
    assert after.withdrawn == {two.identity: "it swears"}
    assert after.previous == two


def test_newer_proposal_voids_the_approval_of_an_older_one(
    settings: Project, store: ArtifactStore
) -> None:
    one, two = merged_model(store, "one"), merged_model(store, "two")
    decide(store, one, held=True)
    decide(store, two, held=True)
    with pytest.raises(ReleaseError, match=f"and {two.merged_model} is proposed"):
        answer(settings, store, "tiny", says("approve", one.merged_model), "")
    assert serves(store) is None


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"name": " "}, "without name"),
        ({"reason": ""}, "without reason"),
        ({"version": ""}, "is proposed"),
        ({"version": "1234567"}, "is proposed"),
    ],
)
def test_incomplete_answer_is_refused(
    settings: Project, store: ArtifactStore, given: dict[str, str], found: str
) -> None:
    one = merged_model(store, "one")
    decide(store, one, held=True)
    with pytest.raises(ReleaseError, match=found):
        answer(
            settings, store, "tiny", says("approve", one.merged_model).model_copy(update=given), ""
        )
    assert state(store).history[-1].decision == PROPOSED


def test_proposal_lapses_and_cannot_be_approved_then(
    settings: Project, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = merged_model(store, "one")
    released = decide(store, one, held=True)
    found = proposal_of(store, "tiny", settings.release)
    assert found is not None
    assert lapse("tiny", released, settings.release) is None
    later = found.since + 14.1 * DAY
    monkeypatch.setattr(approval.time, "time", lambda: later)
    assert "nobody decided within 14 days" in (lapse("tiny", released, settings.release) or "")
    with pytest.raises(ReleaseError, match="lapsed") as error:
        answer(settings, store, "tiny", says("approve", one.merged_model), "")
    assert "ft run --base tiny --asset release" in error.value.fix
    assert serves(store) is None
    monkeypatch.undo()
    two = merged_model(store, "two")
    decide(store, two)
    decide(store, two, "it swears", held=True)
    monkeypatch.setattr(approval.time, "time", lambda: later)
    with pytest.raises(ReleaseError, match="lapsed") as error:
        answer(settings, store, "tiny", says("approve", two.merged_model), "")
    assert f"with rollback_to: {two.merged_model}" in error.value.fix


def test_model_that_was_changed_after_it_was_proposed_is_not_approved(
    settings: Project, store: ArtifactStore
) -> None:
    one = merged_model(store, "one")
    decide(store, one, held=True)
    weights = store.need("merged_model", "tiny").path / "model.safetensors"
    weights.write_text("two")
    with pytest.raises(ArtifactError, match="was changed after it was published"):
        answer(settings, store, "tiny", says("approve", one.merged_model), "")
    assert serves(store) is None


def test_register_with_proposals_is_repaired_without_forgetting_them(
    settings: Project, store: ArtifactStore
) -> None:
    """After each step of every order of answers, a lost CURRENT and version are found again."""
    for number, answers in enumerate(itertools.product(("approve", "reject"), repeat=2)):
        shop = ArtifactStore(store.root / str(number))
        for name, decision in zip(("one", "two"), answers, strict=True):
            model = merged_model(shop, name)
            decide(shop, model, held=True)
            answer(settings, shop, "tiny", says(decision, model.merged_model), "")
            before = state(shop)
            (home(shop) / "CURRENT").unlink()
            with pytest.raises(ReleaseError, match="the register is not whole"):
                current_release(shop, "tiny")
            repair(shop, "tiny")
            assert state(shop) == before
        approved = [
            name for name, how in zip(("one", "two"), answers, strict=True) if how == "approve"
        ]
        assert (state(shop).champion is None) == (not approved)
        if approved:
            assert state(shop).champion == merged_model(shop, approved[-1])
        assert len((home(shop) / DECISIONS).read_text().splitlines()) == 4


@pytest.fixture
def pages(project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv("DAGSTER_HOME", str(project_folder))
    monkeypatch.setenv("FT_CONFIG", str(project_folder / "finetune.yaml"))
    found = pages_app(declared(), proxies=["https://graph.example.org"])
    guarded = Guard(beside(found, found), 3000, ["https://graph.example.org"])
    return TestClient(guarded, "http://127.0.0.1:3000", raise_server_exceptions=False)


@pytest.fixture
def project_folder(project: Path) -> Path:
    edit(project, release={"approval": "required"}, ui={"identity_header": "X-Forwarded-User"})
    (project / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    return project


def test_person_approves_on_the_page_and_the_asset_shows_it(
    pages: TestClient, project_folder: Path
) -> None:
    shop = ArtifactStore(project_folder / ".ft/store")
    one = merged_model(shop, "one")
    decide(shop, one, held=True)
    shown = pages.get("/ft/approval").text
    assert f"<code>{one.merged_model}</code>" in shown
    assert "it is better" in shown
    fields = {"base_model": "tiny", "version": one.merged_model, "decision": "approve"}
    given = {**fields, "name": "Ada <b>", "reason": "it is right"}
    assert pages.post("/ft/approval", data=given).status_code == 415
    foreign = {"origin": "https://evil.example"}
    assert pages.post("/ft/approval", json=given, headers=foreign).status_code == 403
    without = pages.post("/ft/approval", json={**given, "name": " "})
    assert without.status_code == 409
    assert "without name" in without.text
    assert serves(shop) is None
    # Nobody but the proxy can give a name by the header.
    forged = {"x-forwarded-user": "the boss"}
    assert pages.post("/ft/approval", json=given, headers=forged).status_code == 200
    assert serves(shop) == one.merged_model
    told = state(shop).history[-1].approval
    assert told is not None
    assert (told.name, told.by) == ("Ada <b>", "typed in the form")
    assert "Ada &lt;b&gt; (typed in the form)" in pages.get("/ft/approval").text
    with dg.DagsterInstance.from_config(str(project_folder)) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("release"))
    assert event is not None
    assert event.asset_materialization is not None
    assert event.asset_materialization.partition == "tiny"


def test_name_that_the_named_proxy_gives_counts_and_none_is_refused(
    pages: TestClient, project_folder: Path
) -> None:
    shop = ArtifactStore(project_folder / ".ft/store")
    one = merged_model(shop, "one")
    decide(shop, one, held=True)
    host, user = {"host": "graph.example.org"}, ("x-forwarded-user", "ada@example.org")
    given = {
        "base_model": "tiny",
        "version": one.merged_model,
        "decision": "reject",
        "name": "the boss",
        "reason": "it is rude",
    }
    for headers in ([*host.items()], [*host.items(), user, user]):
        refused = pages.post("/ft/approval", json=given, headers=headers)
        assert refused.status_code == 409
        assert "ui.identity_header" in refused.text
    shown = pages.get("/ft/approval", headers=[*host.items(), user]).text
    assert "You are <b>ada@example.org</b>" in shown
    assert 'name="name"' not in shown
    done = pages.post("/ft/approval", json=given, headers=[*host.items(), user])
    assert done.status_code == 200
    told = state(shop).history[-1].approval
    assert told is not None
    assert told.name == "ada@example.org"
    assert told.by == "X-Forwarded-User of graph.example.org"


def test_command_and_job_take_an_answer_and_say_why_they_do_not(project_folder: Path) -> None:
    shop = ArtifactStore(project_folder / ".ft/store")
    one, two = merged_model(shop, "one"), merged_model(shop, "two")
    decide(shop, one, held=True)
    refused = ft(project_folder, "release", "--approve", one.merged_model)
    assert refused.returncode == 2
    assert "without reason" in refused.stderr
    done = ft(
        project_folder,
        *("release", "--approve", one.merged_model[:8], "--name", "Ada", "--reason", "it is right"),
    )
    assert done.returncode == 0, done.stderr
    assert "approved by Ada (ft release, user " in done.stdout
    assert serves(shop) == one.merged_model

    decide(shop, two, held=True)
    job = approve_release(load_project(project_folder / "finetune.yaml"))

    def launch(**fields: str) -> dg.ExecuteInProcessResult:
        config = {"ops": {"decide": {"config": fields}}}
        return job.execute_in_process(run_config=config, raise_on_error=False)

    fields = {"version": two.merged_model, "name": "Ada", "reason": "it is better"}
    assert "decision: perhaps" in failure(launch(**fields, decision="perhaps"))
    assert "(none)" in failure(launch(name="Ada", reason="it is better"))
    assert serves(shop) == one.merged_model
    run = launch(**fields)
    assert run.success, failure(run)
    assert serves(shop) == two.merged_model
    assert state(shop).history[-1].run_id == run.run_id


def test_reminder_comes_after_the_days_that_are_set_and_once_for_each(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(project_folder, alerts={"webhook": {"url_env": "HOOK"}, "ui_url": "https://g.example/"})
    shop = ArtifactStore(project_folder / ".ft/store")
    one = merged_model(shop, "one")
    decide(shop, one, held=True)
    sent = list[Alert]()
    monkeypatch.setattr(approval_reminder, "send", lambda settings, alert: sent.append(alert))
    (sensor,) = approval_reminder.approval_reminder(load_project(project_folder / "finetune.yaml"))
    now, cursor = time.time(), None
    for days, count in ((1, 0), (3.1, 1), (3.2, 1), (6.1, 2), (14.1, 2)):
        monkeypatch.setattr(approval.time, "time", lambda days=days: now + days * DAY)
        context = dg.build_sensor_context(cursor=cursor)
        function: Any = sensor
        function(context)
        cursor = context.cursor
        assert len(sent) == count, days
    assert f"tiny: the promotion of merged_model {one.merged_model} awaits" in sent[0].headline
    assert sent[0].url == "https://g.example/ft/approval"
