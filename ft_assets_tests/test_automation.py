"""What runs without a person.

Sensors are off at first, wait for a file that is still being copied, and report a change once. The
leaderboard follows a failed run.
"""

import uuid
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ft_assets.config import load_project
from ft_assets.definitions import build
from ft_assets.orchestration.automation import automation
from ft_assets_tests.factories import conversations, write_jsonl


def tick(folder: Path, cursor: str | None) -> tuple[Any, str | None]:
    """Evaluate the sensor once; return (what it said, its next cursor)."""
    project = load_project(folder / "finetune.yaml")
    sensor = automation(project, dg.StaticPartitionsDefinition(["tiny"]))[1][0]
    with dg.build_sensor_context(cursor=cursor) as context:
        said: Any = sensor(context)
        return said, said.cursor if isinstance(said, dg.SensorResult) else context.cursor


def test_change_of_data_is_reported_once_and_only_when_the_files_are_still(project: Path) -> None:
    said, cursor = tick(project, None)
    assert isinstance(said, dg.SkipReason)  # seen once: perhaps a copy in progress
    write_jsonl(project / "data/train.jsonl", conversations(130, lambda _: "yes"))
    said, cursor = tick(project, cursor)
    assert isinstance(said, dg.SkipReason)  # still moving
    said, cursor = tick(project, cursor)
    assert [event.asset_key.to_user_string() for event in said.asset_events] == ["data_files"]
    version = said.asset_events[0].tags["dagster/data_version"]
    said, cursor = tick(project, cursor)
    assert isinstance(said, dg.SkipReason)
    (project / "data/train.jsonl").rename(project / "data/renamed.jsonl")
    (project / "finetune.yaml").write_text(
        (project / "finetune.yaml").read_text().replace("data/train.jsonl", "data/renamed.jsonl")
    )
    said, _ = tick(project, cursor)
    assert isinstance(said, dg.SkipReason), version  # a name is not content


def test_missing_file_is_a_reason_to_wait_not_a_crash(project: Path) -> None:
    (project / "data/train.jsonl").unlink()
    said, _ = tick(project, None)
    assert isinstance(said, dg.SkipReason)
    assert "train.jsonl" in (said.skip_message or "")


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
        "data_files_sensor": dg.DefaultSensorStatus.STOPPED,
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
