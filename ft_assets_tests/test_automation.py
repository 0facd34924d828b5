"""What runs without a person: off at first, waits for a file that is still being copied, reports a change once."""

import uuid
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData
from dagster._core.events import DagsterEvent, DagsterEventType

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
        "data_files_sensor": dg.DefaultSensorStatus.STOPPED,
        "rerun_stale": dg.DefaultSensorStatus.STOPPED,
    }


class Graph:
    """The real definitions with two base models on an instance; what a step makes is only reported, so that a tick costs nothing."""

    def __init__(self, folder: Path, tiny_model: Path) -> None:
        path = folder / "finetune.yaml"
        models = {name: {"folder": str(tiny_model)} for name in ("small", "large")}
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "base_models": models}))
        self.definitions = build(load_project(folder / "finetune.yaml"))
        self.graph = self.definitions.resolve_asset_graph()
        self.instance, self.cursor = dg.DagsterInstance.ephemeral(), None
        self.blocking: dict[str, list[str]] = {}
        for key in self.graph.asset_check_keys:
            if self.graph.get(key).blocking:
                self.blocking.setdefault(key.asset_key.to_user_string(), []).append(key.name)
        for key in (key for level in self.graph.toposorted_asset_keys_by_level for key in level):
            self.made(key.to_user_string(), "1")
        self.tick()

    def made(self, asset: str, version: str, only: str | None = None) -> None:
        """Report that an asset was made with this content, and that its blocking checks passed."""
        partitioned = self.graph.get(dg.AssetKey(asset)).is_partitioned
        for name in ([only] if only else ["small", "large"]) if partitioned else [None]:
            tags = {"dagster/data_version": version}
            self.instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=name, tags=tags))
            for check in self.blocking.get(asset, ()):
                self.judged(check, asset, True, name)

    def judged(self, check: str, asset: str, passed: bool, only: str | None) -> None:
        """Report a check's result, of a run of its own: results without a run cannot be reported twice."""
        wanted = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[only] if only else None)
        record = self.instance.fetch_materializations(wanted, limit=1).records[0]
        target = AssetCheckEvaluationTargetMaterializationData(
            storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
        )
        evaluation = dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(asset), check_name=check, passed=passed, metadata={}, partition=only, target_materialization_data=target
        )
        event = DagsterEvent(DagsterEventType.ASSET_CHECK_EVALUATION.value, job_name="", event_specific_data=evaluation)
        self.instance.report_dagster_event(event, run_id=str(uuid.uuid4()))

    def tick(self) -> set[str]:
        """Return what is requested, as `asset` or `asset[partition]`."""
        found = dg.evaluate_automation_conditions(self.definitions, self.instance, cursor=self.cursor)
        self.cursor = found.cursor
        requested = set()
        for key in self.graph.materializable_asset_keys:
            name = key.to_user_string()
            for partition in found.get_requested_partitions(key):
                requested.add(f"{name}[{partition}]" if partition else name)
        return requested


@pytest.fixture
def graph(project: Path, tiny_model: Path) -> Graph:
    return Graph(project, tiny_model)


def both(*names: str) -> set[str]:
    return {f"{name}[{partition}]" for name in names for partition in ("small", "large")}


def test_same_content_again_requests_nothing(graph: Graph) -> None:
    assert graph.tick() == set()
    for asset in ("data_files", "raw_dataset", "chat_dataset", "heldout_split"):
        graph.made(asset, "1")
        assert graph.tick() == set(), asset


def test_changed_data_walks_down_step_by_step_and_stops_where_content_stays(graph: Graph) -> None:
    graph.made("data_files", "2")
    assert graph.tick() == {"raw_dataset", "raw_preferences"}
    graph.made("raw_preferences", "1")
    graph.made("raw_dataset", "2")
    assert graph.tick() == both("chat_dataset")  # the report waits, although the raw data is its input too
    graph.made("chat_dataset", "2", only="large")  # the small model's rows came out the same
    graph.made("chat_dataset", "1", only="small")
    assert graph.tick() >= {"heldout_split[large]"}
    graph.made("heldout_split", "2", only="large")
    graph.made("heldout_split", "1", only="small")
    requested = graph.tick()
    assert "lora_adapter[large]" in requested
    assert "lora_adapter[small]" not in requested
    assert not {name for name in requested if "large" in name and not name.startswith("lora")}
    graph.made("lora_adapter", "2", only="large")
    assert "dpo_adapter[large]" in graph.tick()


def test_one_base_models_recipe_requests_that_one(graph: Graph) -> None:
    graph.made("recipe", "2", only="small")
    assert {name.partition("[")[2] for name in graph.tick()} == {"small]"}


def test_failed_verdict_holds_the_merge_until_it_passes(graph: Graph) -> None:
    graph.made("eval_report", "2", only="small")
    graph.judged("better_than_base", "eval_report", False, "small")
    assert not {name for name in graph.tick() if "merged_model" in name}
    graph.judged("better_than_base", "eval_report", True, "small")
    assert "merged_model[small]" in graph.tick()
