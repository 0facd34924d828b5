"""What runs without a person.

Sensors are off at first, wait for a file that is still being copied, and report a change once. The
leaderboard follows a failed run.
"""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ft_assets.config import load_project
from ft_assets.definitions import build
from ft_assets.orchestration.data_sources import report_sources, reported, source_versions
from ft_assets.orchestration.mark_stale import mark_stale
from ft_assets_tests.factories import conversations, write_jsonl

SOURCES = ["few_shot_files", "preferences_files", "retention_files", "train_files"]


class Watch:
    """`mark_stale` of a project in which nothing was made, and the instance it reports to."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.folder, self.instance, self.cursor = folder, instance, None

    def tick(self) -> list[str]:
        """Evaluate it once, report its events as a daemon does, and return their assets."""
        project = load_project(self.folder / "finetune.yaml")
        with dg.build_sensor_context(instance=self.instance, cursor=self.cursor) as context:
            said: Any = mark_stale(project, build)(context)
            self.cursor = said.cursor if isinstance(said, dg.SensorResult) else context.cursor
        self.said = (said.skip_message or "") if isinstance(said, dg.SkipReason) else ""
        events = said.asset_events if isinstance(said, dg.SensorResult) else []
        for event in events:
            self.instance.report_runless_asset_event(event)
        return [event.asset_key.to_user_string() for event in events]


@pytest.fixture
def watch(project: Path) -> Iterator[Watch]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Watch(project, instance)


def test_change_of_data_is_reported_once_of_its_source_and_only_when_the_files_are_still(
    watch: Watch,
) -> None:
    data = watch.folder / "data"
    assert watch.tick() == []  # seen once: perhaps a copy in progress
    assert sorted(name for name in watch.tick() if name.endswith("_files")) == SOURCES
    write_jsonl(data / "train.jsonl", conversations(130, lambda _: "yes"))
    assert watch.tick() == []  # still moving
    assert watch.tick() == ["train_files"]
    assert watch.tick() == []
    (data / "train.jsonl").rename(data / "renamed.jsonl")
    settings = watch.folder / "finetune.yaml"
    settings.write_text(settings.read_text().replace("data/train.jsonl", "data/renamed.jsonl"))
    assert watch.tick() == watch.tick() == []  # a name is not content


def test_missing_file_is_a_reason_to_wait_not_a_crash(watch: Watch) -> None:
    (watch.folder / "data/train.jsonl").unlink()
    assert watch.tick() == []
    assert "train.jsonl" in watch.said


def test_unexpected_error_of_a_tick_is_one_screen_with_its_trace_in_a_file(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("files")

    monkeypatch.setattr("ft_assets.orchestration.mark_stale.source_versions", broken)
    monkeypatch.chdir(watch.folder)
    with pytest.raises(dg.Failure, match="mark_stale failed unexpectedly: KeyError: 'files'"):
        watch.tick()
    (file,) = (watch.folder / ".ft/logs").iterdir()
    assert "Traceback" in file.read_text()


def test_run_reports_the_sources_before_it_starts(watch: Watch) -> None:
    project = load_project(watch.folder / "finetune.yaml")
    report_sources(watch.instance, project)
    assert reported(watch.instance, project) == source_versions(project)
    watch.tick()
    assert not [name for name in watch.tick() if name.endswith("_files")]


@pytest.mark.parametrize("scheduled", [False, True])
def test_schedule_is_there_if_asked_for_and_nothing_starts_by_default(
    project: Path, scheduled: bool
) -> None:
    if scheduled:
        with (project / "finetune.yaml").open("a") as file:
            file.write('\nschedule: {cron: "0 3 * * 1", timezone: Europe/Berlin}\n')
    repository = build(load_project(project / "finetune.yaml")).get_repository_def()
    assert [schedule.name for schedule in repository.schedule_defs] == (
        ["retrain_schedule"] if scheduled else []
    )
    for schedule in repository.schedule_defs:
        assert (schedule.cron_schedule, schedule.execution_timezone) == (
            "0 3 * * 1",
            "Europe/Berlin",
        )
        assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert {sensor.name: sensor.default_status for sensor in repository.sensor_defs} == {
        # It only looks.
        "bring_up_to_date_runs": dg.DefaultSensorStatus.RUNNING,  # and what a person asked for
        "mark_stale": dg.DefaultSensorStatus.RUNNING,
        # It follows a run that a person has started.
        "leaderboard_after_failure": dg.DefaultSensorStatus.RUNNING,
        "rerun_stale": dg.DefaultSensorStatus.STOPPED,
    }


@pytest.mark.parametrize(
    ("job", "chosen", "expected"),
    [
        ("retrain", None, True),  # the schedule's, or of the whole graph in the UI
        ("retrain", ["eval_report", "merged_model", "leaderboard"], True),
        ("__ASSET_JOB", ["eval_report", "leaderboard"], True),
        ("__ASSET_JOB", ["eval_report"], False),
        ("retrain", ["leaderboard"], False),  # its own failure: it would fail again
        ("what_would_run", None, False),
    ],
)
def test_leaderboard_that_a_failed_run_skipped_is_made_after_it(
    project: Path, job: str, chosen: list[str] | None, expected: bool
) -> None:
    definitions = build(load_project(project / "finetune.yaml"))
    repository = definitions.get_repository_def()
    sensor: Any = repository.get_sensor_def("leaderboard_after_failure")
    selection = frozenset(dg.AssetKey(name) for name in chosen) if chosen else None
    with dg.DagsterInstance.ephemeral() as instance:
        run = dg.DagsterRun(
            job_name=job,
            run_id=str(uuid.uuid4()),
            status=dg.DagsterRunStatus.STARTED,
            asset_selection=selection,
        )
        instance.add_run(run)
        event = instance.report_run_failed(run)
        context = dg.build_run_status_sensor_context(
            sensor.name, event, instance, run, repository_def=repository
        ).for_run_failure()
        said = sensor(context)
        if not expected:
            assert isinstance(said, dg.SkipReason)
            return
        assert (said.asset_selection, said.partition_key) == ([dg.AssetKey("leaderboard")], None)
        board = definitions.resolve_job_def("retrain").get_subset(
            asset_selection=set(said.asset_selection)
        )
        assert board.execute_in_process(instance=instance).success  # without a partition
