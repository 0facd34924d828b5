"""Two projects in one code location of somebody else, put there by the component."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster.components.testing import create_defs_folder_sandbox

from ft_assets.artifacts import ArtifactStore
from ft_assets.component import FineTuneComponent
from ft_assets.config import Place, load_project
from ft_assets.errors import ConfigError
from ft_assets.orchestration.place import concerns
from ft_assets_tests.pipeline import InProcessLauncher, failure

PARTS = ("support", "sales")
LIGHT = ["raw_dataset", "raw_preferences", "recipe", "base_model", "chat_dataset", "heldout_split"]
EVERYTHING = {
    "schedule": {"cron": "0 3 * * 1"},
    "verify": {"cron": "0 3 * * 1"},
    "release": {"approval": "required"},
    "alerts": {"webhook": {"url_env": "X"}, "slack": {"token_env": "Y", "channel": "#m"}},
}


def load(folder: Path, **attributes: Any) -> dg.Definitions:
    """Load a code location with the projects of a folder, each below its own prefix."""
    with create_defs_folder_sandbox() as sandbox:
        for part in PARTS:
            given = {"project": str(folder / part), "key_prefix": ["ml", part], **attributes}
            sandbox.scaffold_component(
                component_cls=FineTuneComponent,
                defs_path=part,
                defs_yaml_contents={
                    "type": "ft_assets.FineTuneComponent",
                    "attributes": given,
                },
            )
        with sandbox.build_all_defs() as defs:
            return defs


def change(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "finetune.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | settings))


@pytest.fixture
def folder(tmp_path: Path, make_project: Callable[[Path], Path]) -> Path:
    """Return a folder with two projects whose settings have all that automates."""
    for part in PARTS:
        change(make_project(tmp_path / part), EVERYTHING)
    return tmp_path


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def test_projects_share_no_key_and_no_name(folder: Path) -> None:
    defs = load(folder, group="models")
    repository = defs.get_repository_def()
    keys = defs.resolve_asset_graph().get_all_asset_keys()
    assert {tuple(key.path[:2]) for key in keys} == {("ml", part) for part in PARTS}
    assert {node.group_name for node in defs.resolve_asset_graph().asset_nodes} == {"models"}
    names = {
        *(job.name for job in repository.get_all_jobs() if job.name != "__ASSET_JOB"),
        *(one.name for one in (*repository.schedule_defs, *repository.sensor_defs)),
        *(defs.resources or {}),
    }
    of = {part: {name for name in names if name.startswith(f"ml__{part}__")} for part in PARTS}
    assert of["support"] | of["sales"] == names
    assert [name.replace("support", "sales") for name in sorted(of["support"])] == sorted(
        of["sales"]
    )


def test_one_run_makes_the_artifacts_of_both_projects_in_their_own_stores(
    folder: Path, instance: dg.DagsterInstance
) -> None:
    defs = load(folder)
    resources: Any = defs.resources
    for part in PARTS:
        resources[f"ml__{part}__materializer"].launcher = InProcessLauncher()
    run = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance,
        partition_key="tiny",
        asset_selection=[dg.AssetKey(["ml", part, name]) for part in PARTS for name in LIGHT],
        raise_on_error=False,
    )
    assert run.success, failure(run)
    for part in PARTS:
        store = ArtifactStore(folder / part / ".ft/store")
        key = dg.AssetKey(["ml", part, "heldout_split"])
        event = instance.get_latest_materialization_event(key)
        assert event is not None and event.asset_materialization is not None
        metadata = event.asset_materialization.metadata
        made = store.need("heldout_split", "tiny")
        assert metadata["fingerprint"].value == made.fingerprint
        assert not [name for name, value in metadata.items() if "/ft/" in str(value.value)]
        project = load_project(folder / part / "finetune.yaml", Place(prefix=("ml", part)))
        assert concerns(project, run.dagster_run, instance)
    other = load_project(folder / "sales/finetune.yaml", Place(prefix=("ml", "s")))
    assert not concerns(other, run.dagster_run, instance)


@pytest.mark.parametrize(
    ("attributes", "settings", "found"),
    [
        ({"key_prefix": ["ml"]}, {}, "key_prefix: ml is that of"),
        ({"key_prefix": "a-b/c"}, {}, "'a-b' cannot be part of a name"),
        ({"key_prefix": []}, {}, "key_prefix: is empty"),
        ({}, {"store": "../one"}, "is also the store of ml/s"),
        ({"project": "nowhere"}, {}, "no such file"),
    ],
)
def test_projects_that_would_clash_are_refused(
    folder: Path, attributes: dict[str, Any], settings: dict[str, Any], found: str
) -> None:
    for part in PARTS:
        change(folder / part, settings)
    with pytest.raises(Exception) as refused:
        load(folder, **attributes)
    cause: BaseException | None = refused.value
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__cause__
    assert found in str(cause)
