"""What runs without a person: off at first, waits for a file that is still being copied, reports a change once."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ft_assets.automation import automation
from ft_assets.config import load_project
from ft_assets.definitions import build
from ft_assets_tests.conftest import conversations, write_jsonl


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
    (project / "finetune.yaml").write_text((project / "finetune.yaml").read_text().replace("data/train.jsonl", "data/renamed.jsonl"))
    said, _ = tick(project, cursor)
    assert isinstance(said, dg.SkipReason), version  # a name is not content


def test_missing_file_is_a_reason_to_wait_not_a_crash(project: Path) -> None:
    (project / "data/train.jsonl").unlink()
    said, _ = tick(project, None)
    assert isinstance(said, dg.SkipReason)
    assert "train.jsonl" in (said.skip_message or "")


@pytest.mark.parametrize("scheduled", [False, True])
def test_schedule_is_there_if_asked_for_and_nothing_runs_by_default(project: Path, scheduled: bool) -> None:
    if scheduled:
        with (project / "finetune.yaml").open("a") as file:
            file.write('\nschedule: {cron: "0 3 * * 1", timezone: Europe/Berlin}\n')
    repository = build(load_project(project / "finetune.yaml")).get_repository_def()
    assert [schedule.name for schedule in repository.schedule_defs] == (["retrain_schedule"] if scheduled else [])
    for schedule in repository.schedule_defs:
        assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 3 * * 1", "Europe/Berlin")
        assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert {sensor.name: sensor.default_status for sensor in repository.sensor_defs} == {
        "data_files_sensor": dg.DefaultSensorStatus.STOPPED
    }
