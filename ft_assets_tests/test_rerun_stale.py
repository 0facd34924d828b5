"""`rerun_stale` requests exactly what the plan would run, once, until something changes.

One test runs a real daemon.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from ft_assets.artifacts import ArtifactStore
from ft_assets.artifacts.manifest import Manifest
from ft_assets.config import load_project
from ft_assets.definitions import build
from ft_assets.orchestration import materializer as materializer
from ft_assets.orchestration.mark_stale import CHECK
from ft_assets.orchestration.rerun_stale import UNSEEN
from ft_assets_tests.factories import conversations, edit, write_jsonl
from ft_assets_tests.launching import stop_services
from ft_assets_tests.pipeline import InProcessLauncher, materialize
from ft_assets_tests.test_orphans import instance_in, until

BELOW_TRAINING = {
    "lora_adapter",
    "dpo_adapter",
    "answers",
    "eval_report",
    "merged_model",
    "release",
    "export",
}
BELOW_REPORT = {"eval_report", "merged_model", "release", "export"}
BELOW_BASE = {"base_model", "chat_dataset", "heldout_split", *BELOW_TRAINING}


def two_models(folder: Path) -> Path:
    """Give the finished project a second base model, `other`, with the artifacts of the first.

    A fingerprint does not name the base model, so the copies are valid.
    """
    base = folder / "base"
    model = yaml.safe_load((folder / "finetune.yaml").read_text())["base_models"]["tiny"]
    shutil.copytree(model["folder"], base)
    edit(folder, base_models={"tiny": model, "other": {"folder": "base"}})
    for home in (folder / ".ft/store").glob("*/tiny"):
        shutil.copytree(home, home.with_name("other"))
        for path in home.with_name("other").glob("*/manifest.json"):
            manifest = Manifest.model_validate_json(path.read_text())
            path.write_text(manifest.model_copy(update={"partition": "other"}).sealed().to_text())
    for name in ("tiny", "other"):  # its place is another
        assert materialize(folder, "base_model", name).success
    assert materialize(folder, "leaderboard").success
    return folder


@pytest.fixture(scope="module")
def both(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("both") / "project"
    shutil.copytree(finished, target)
    return two_models(target)


class Switched:
    """The running sensor, after it has seen the data files. Its definitions are built once, as a
    code server builds them."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.folder, self.instance, self.cursor = folder, instance, None
        self.definitions = build(load_project(folder / "finetune.yaml"))
        self.repository = self.definitions.get_repository_def()
        self.said, self.looked = "", None
        assert self.tick() == {}  # the data files are seen for the first time

    def requests(self) -> list[dg.RunRequest]:
        """Evaluate it once."""
        with dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor, repository_def=self.repository
        ) as context:
            ticked = self.repository.get_sensor_def("rerun_stale").evaluate_tick(context)
        self.cursor, self.said = ticked.cursor, ticked.skip_message or ""
        return list(ticked.run_requests or [])

    def tick(self) -> dict[str | None, set[str]]:
        """Evaluate it once; return {base model: assets}."""
        return {
            one.partition_key: {key.to_user_string() for key in one.asset_selection or ()}
            for one in self.requests()
        }

    def look(self) -> list[str]:
        """Evaluate `mark_stale` once; return the data sources that it reports."""
        with dg.build_sensor_context(
            instance=self.instance, cursor=self.looked, repository_def=self.repository
        ) as context:
            ticked = self.repository.get_sensor_def("mark_stale").evaluate_tick(context)
        self.looked, self.said = ticked.cursor, ticked.skip_message or ""
        for event in ticked.asset_events:
            self.instance.report_runless_asset_event(event)
        return [event.asset_key.to_user_string() for event in ticked.asset_events]

    def marks(self) -> dict[tuple[str, str | None], str]:
        """Return {(asset, base model): reason} of what the UI shows as out of date."""
        keys = [key for key in self.repository.asset_graph.asset_check_keys if key.name == CHECK]
        found = dict[tuple[str, str | None], str]()
        for key in keys:
            history = self.instance.event_log_storage.get_asset_check_execution_history(key, 100)
            latest = {
                evaluation.partition: evaluation
                for record in reversed(history)
                if record.event and (evaluation := record.event.asset_check_evaluation)
            }
            for partition, evaluation in latest.items():
                if not evaluation.passed:
                    found[key.asset_key.to_user_string(), partition] = evaluation.description or ""
        return found

    def marked(self) -> dict[str | None, set[str]]:
        """Look until what changed is planned; return {base model: marked assets}."""
        assert self.look() == []  # perhaps a copy in progress
        self.look()
        assert self.look() == [] and self.said == "nothing has changed"
        found = dict[str | None, set[str]]()
        for asset, partition in self.marks():
            found.setdefault(partition, set()).add(asset)
        return found

    def run(self, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
        """Do what a daemon does with a request, in this process."""
        definitions = build(load_project(self.folder / "finetune.yaml"))
        resources: Any = definitions.resources
        resources["materializer"].launcher = InProcessLauncher()
        job = definitions.resolve_job_def("retrain").get_subset(
            asset_selection=set(request.asset_selection or ()),
            asset_check_selection=set(request.asset_check_keys or ()),
        )
        return job.execute_in_process(
            instance=self.instance,
            partition_key=request.partition_key,
            raise_on_error=False,
            tags=request.tags,
        )


@pytest.fixture
def switched(both: Path, tmp_path: Path) -> Iterator[Switched]:
    shutil.copytree(both, tmp_path / "project")
    with dg.DagsterInstance.ephemeral() as instance:
        yield Switched(tmp_path / "project", instance)


def of_other(folder: Path, **sections: Any) -> None:
    """Change settings of the base model `other` alone."""
    models = yaml.safe_load((folder / "finetune.yaml").read_text())["base_models"]
    edit(folder, base_models={**models, "other": {**models["other"], **sections}})


CHANGES: dict[str, tuple[Callable[[Path], Any], dict[str | None, set[str]]]] = {
    "alerts": (lambda folder: edit(folder, alerts={"ui_url": "https://graph.example.org"}), {}),
    "learning rate of one": (
        lambda folder: of_other(folder, sft={"learning_rate": 0.03}),
        {"other": {"recipe", *BELOW_TRAINING}},
    ),
    "heldout_share": (
        lambda folder: edit(folder, data={"heldout_share": 0.3}),
        {name: {"heldout_split", *BELOW_TRAINING} for name in ("tiny", "other")},
    ),
    "gate": (
        lambda folder: edit(folder, gate={"min_heldout_rows": 11}),
        dict.fromkeys(("tiny", "other"), BELOW_REPORT),
    ),
    "a base": (
        lambda folder: (folder / "base/config.json").open("a").write("\n"),
        {"other": BELOW_BASE},
    ),
    "times of a base": (lambda folder: os.utime(folder / "base/config.json"), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_that_dagster_has_no_event_of_is_requested_once(
    switched: Switched, change: str
) -> None:
    make, expected = CHANGES[change]
    assert switched.marked() == {}
    make(switched.folder)
    assert switched.marked() == expected | ({None: {"leaderboard"}} if expected else {})
    assert switched.tick() == expected
    if expected:
        assert switched.tick() == {}


def test_newer_library_is_requested_once(
    switched: Switched, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = materializer.library_versions
    newer: Any = lambda kind: {**real(kind), **({"peft": "99"} if "peft" in real(kind) else {})}  # noqa: E731
    monkeypatch.setattr(materializer, "library_versions", newer)
    assert switched.tick() == dict.fromkeys(("tiny", "other"), BELOW_TRAINING)
    assert switched.tick() == {}


def test_changed_data_is_awaited_and_read_once_for_all_base_models(switched: Switched) -> None:
    write_jsonl(switched.folder / "data/train.jsonl", conversations(121, lambda _: "yes"))
    assert switched.tick() == {}  # perhaps a copy in progress
    write_jsonl(switched.folder / "data/train.jsonl", conversations(122, lambda _: "yes"))
    assert switched.tick() == {}
    (request,) = switched.requests()
    assert request.partition_key is None
    assert [key.to_user_string() for key in request.asset_selection or ()] == ["raw_dataset"]
    assert switched.tick() == {}
    assert switched.run(request).success
    assert switched.tick() == {name: BELOW_BASE - {"base_model"} for name in ("tiny", "other")}


def test_one_more_pair_marks_its_source_and_what_is_below_with_the_reason(
    switched: Switched,
) -> None:
    assert switched.marked() == {}
    with (switched.folder / "data/pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "new bread", "chosen": "yes", "rejected": "no no"}) + "\n")
    assert switched.look() == []
    assert switched.look() == ["preferences_files"]
    why = switched.marks()
    reason = "out of date: preferences: data/pairs.jsonl changed"
    assert why.pop(("raw_preferences", None)) == reason
    below = {"chat_dataset", "heldout_split", *BELOW_TRAINING}
    assert why.keys() == {(asset, name) for asset in below for name in ("tiny", "other")} | {
        ("leaderboard", None)
    }
    assert "raw_preferences" in why["chat_dataset", "tiny"]
    assert materialize(switched.folder, "*", "tiny").success
    assert materialize(switched.folder, "*", "other").success
    assert switched.marked() == {}


def test_button_runs_what_is_out_of_date_of_the_base_models_that_it_names(
    switched: Switched,
) -> None:
    job = switched.definitions.resolve_job_def("bring_up_to_date")
    sensor: Any = switched.repository.get_sensor_def("bring_up_to_date_runs")

    def press(*names: str) -> list[dg.RunRequest]:
        config = {"ops": {"find_stale": {"config": {"base_models": list(names)}}}} if names else {}
        done = job.execute_in_process(
            instance=switched.instance, run_config={**config, "loggers": {"console": {}}}
        )
        run = switched.instance.get_run_by_id(done.run_id)
        assert run is not None
        ended = next(event for event in done.all_events if event.is_job_success)
        context = dg.build_run_status_sensor_context(sensor.name, ended, switched.instance, run)
        return [one for one in sensor(context) if isinstance(one, dg.RunRequest)]

    assert press() == []
    of_other(switched.folder, sft={"learning_rate": 0.03})
    assert press("tiny") == []
    (request,) = press()
    assert request.partition_key == "other"
    chosen = {key.to_user_string() for key in request.asset_selection or ()}
    assert chosen == {"recipe", *BELOW_TRAINING, "leaderboard"}
    assert switched.run(request).success
    assert press() == []


def test_what_was_requested_and_not_made_waits_for_a_change(switched: Switched) -> None:
    of_other(switched.folder, sft={"learning_rate": 0.03})
    assert set(switched.tick()) == {"other"}
    assert materialize(
        switched.folder, "recipe", "other"
    ).success  # the run came so far, and its training failed
    assert switched.tick() == {}
    assert "lora_adapter" in switched.said
    assert "not again before something changes" in switched.said
    edit(
        switched.folder, launcher={"kind": "local", "retries": 1}
    )  # decides no content; perhaps what it failed of
    assert switched.tick() == {"other": BELOW_TRAINING}
    assert switched.tick() == {}
    of_other(switched.folder, sft={"learning_rate": 0.04})
    assert switched.tick() == {"other": {"recipe", *BELOW_TRAINING}}


def test_setting_that_is_taken_back_is_made_current_again(switched: Switched) -> None:
    of_other(switched.folder, sft={"learning_rate": 0.03})
    assert materialize(switched.folder, "recipe", "other").success
    of_other(switched.folder)
    of_other(switched.folder, sft={})
    assert "recipe" in switched.tick()["other"]


@pytest.mark.parametrize(
    ("partition", "expected"), [("other", {}), (None, {}), ("tiny", {"other"})]
)
def test_base_model_of_which_a_run_is_under_way_waits(
    switched: Switched, partition: str | None, expected: set[str]
) -> None:
    of_other(switched.folder, sft={"learning_rate": 0.03})
    tags = {"dagster/partition": partition} if partition else {}
    run = dg.DagsterRun(
        job_name="retrain",
        run_id="00000000-0000-0000-0000-000000000001",
        status=dg.DagsterRunStatus.STARTED,
        tags=tags,
    )
    switched.instance.add_run(run)
    assert set(switched.tick()) == set(expected)
    switched.instance.report_run_failed(run)
    assert set(switched.tick()) == {"other"} - set(expected)


def test_check_that_failed_holds_also_in_a_later_run(switched: Switched) -> None:
    of_other(switched.folder, chat={"max_length": 23})
    (request,) = switched.requests()
    assert not switched.run(request).success  # few_rows_are_too_long
    store = ArtifactStore(switched.folder / ".ft/store")
    split = store.current_name("heldout_split", "other")
    assert switched.tick() == {}
    of_other(switched.folder, chat={"max_length": 23}, sft={"learning_rate": 0.03})
    (request,) = switched.requests()
    assert "chat_dataset" not in {key.to_user_string() for key in request.asset_selection or ()}
    assert not switched.run(request).success
    assert store.current_name("heldout_split", "other") == split
    of_other(switched.folder, chat={"max_length": 23, "max_truncated": 1.0})
    assert "heldout_split" in switched.tick()["other"]


def test_leaderboard_is_made_when_nothing_else_is_to_do_also_if_a_base_model_never_merged(
    switched: Switched,
) -> None:
    for asset in ("eval_report", "merged_model"):
        (switched.folder / ".ft/store" / asset / "other/CURRENT").unlink()
        shutil.rmtree(
            next(
                path.parent
                for path in (switched.folder / ".ft/store" / asset / "other").glob(
                    "*/manifest.json"
                )
            )
        )
    assert set(switched.tick()) == {"other"}
    (request,) = switched.requests()  # a run of `other` was requested, and has failed
    assert (request.partition_key, request.asset_selection) == (None, [dg.AssetKey("leaderboard")])
    assert switched.run(request).success
    text = (
        ArtifactStore(switched.folder / ".ft/store").need("leaderboard", None).path
        / "leaderboard.md"
    ).read_text()
    assert "eval_report has not been made" in text
    assert switched.tick() == {}


def test_refused_settings_and_a_missing_file_are_reasons_to_wait(switched: Switched) -> None:
    text = (switched.folder / "finetune.yaml").read_text()
    (switched.folder / "finetune.yaml").write_text(text.replace("learning_rate", "learning_rat"))
    assert switched.tick() == {}
    assert "learning_rat" in switched.said
    (switched.folder / "finetune.yaml").write_text(text)
    (switched.folder / "base/config.json").unlink()
    assert switched.tick() == {}
    assert "other: base_model" in switched.said


def test_looking_loads_no_torch(both: Path) -> None:
    code = """
import sys
import dagster as dg
from ft_assets.definitions import defs
repository = defs().get_repository_def()
cursor = None
with dg.DagsterInstance.ephemeral() as instance:
    for _ in range(2):
        with dg.build_sensor_context(
            instance=instance, cursor=cursor, repository_def=repository
        ) as context:
            ticked = repository.get_sensor_def("rerun_stale").evaluate_tick(context)
        cursor = ticked.cursor
assert ticked.skip_message == "nothing is stale", ticked
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    environment = {**os.environ, "FT_CONFIG": str(both / "finetune.yaml")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


LOCATION = """
from ft_assets.orchestration import rerun_stale
rerun_stale.INTERVAL_SECONDS = 3
from ft_assets.definitions import defs
"""


def test_daemon_sees_a_learning_rate_in_the_file_and_requests_that_base_models_steps_once(
    both: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(both, folder)
    (tmp_path / "location.py").write_text(LOCATION)
    instance = instance_in(tmp_path / "home")
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(tmp_path / "home"),
        "FT_CONFIG": str(folder / "finetune.yaml"),
    }
    where = ["-f", str(tmp_path / "location.py"), "-d", str(tmp_path)]
    start = [sys.executable, "-m", "dagster", "sensor", "start", "rerun_stale", *where]
    assert (
        subprocess.run(
            start, env=environment, check=False, capture_output=True, timeout=200
        ).returncode
        == 0
    )

    def ticks() -> list[Any]:
        (state,) = [
            state
            for state in instance.all_instigator_state()
            if state.instigator_name == "rerun_stale"
        ]
        return list(instance.get_ticks(state.instigator_origin_id, state.selector_id))

    def quiet() -> int:
        """Return the number of ticks with nothing to request and no run to wait for.

        A verdict that is not a PASS refuses the merge in each of them.
        """
        said = [tick.skip_reason or UNSEEN for tick in ticks()]
        return sum(reason != UNSEEN and "under way" not in reason for reason in said)

    with (tmp_path / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "dagster._daemon", "run", *where],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until(quiet)
        assert instance.get_runs() == []
        adapter = ArtifactStore(folder / ".ft/store").current_name("lora_adapter", "other")
        of_other(folder, sft={"learning_rate": 0.021})
        (run,) = until(instance.get_runs)
        assert run.tags["dagster/partition"] == "other"
        assert run.tags["ft/started_by"] == "rerun_stale"
        assert {key.to_user_string() for key in run.asset_selection or ()} == {
            "recipe",
            *BELOW_TRAINING,
        }
        until(lambda: instance.get_run_by_id(run.run_id).is_finished, 300)  # pyright: ignore[reportOptionalMemberAccess]
        assert ArtifactStore(folder / ".ft/store").current_name("lora_adapter", "other") != adapter
        before = quiet()
        until(
            lambda: quiet() >= before + 2
        )  # it looked, found nothing, and had not asked twice meanwhile
        # Its own run, or the one before ended with no PASS: the leaderboard is made after it, once.
        boards = [again for again in instance.get_runs() if again.run_id != run.run_id]
        assert all(
            {key.to_user_string() for key in board.asset_selection or ()} == {"leaderboard"}
            for board in boards
        )
        assert len(boards) == 1
    finally:
        stop_services(daemon)
