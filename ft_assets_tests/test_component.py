"""Two projects in one code location of somebody else, put there by the component."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster.components.testing import create_defs_folder_sandbox

from ft_assets.artifacts import ArtifactStore
from ft_assets.component import FineTuneComponent, require_apart
from ft_assets.config import Place, load_project
from ft_assets.data.tables import read_table
from ft_assets.definitions import build
from ft_assets.errors import ConfigError
from ft_assets.orchestration.place import concerns
from ft_assets.orchestration.run_plan import REFUSED, REUSED, STOPPED, plan
from ft_assets.rows.types import DataRow
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
    ("prefix", "ours"), [(("ml", "support"), True), (("ml",), False), (("ml", "sup"), False)]
)
def test_run_of_a_job_concerns_the_project_that_has_it(
    project: Path, instance: dg.DagsterInstance, prefix: tuple[str, ...], ours: bool
) -> None:
    run = dg.DagsterRun(job_name=Place(prefix=("ml", "support")).name("retrain"))
    here = load_project(project / "finetune.yaml", Place(prefix=prefix))
    assert concerns(here, run, instance) == ours


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


def test_two_projects_of_one_folder_do_not_both_read_assets(project: Path) -> None:
    settings = yaml.safe_load((project / "finetune.yaml").read_text())
    for name in ("one", "two"):
        own = {"store": f"./{name}", "data": {**settings["data"], "train": {"asset": f"a/{name}"}}}
        (project / f"{name}.yaml").write_text(yaml.safe_dump(settings | own))
    one, two = (
        load_project(project / f"{name}.yaml", Place(prefix=(name,))) for name in ("one", "two")
    )
    with pytest.raises(ConfigError, match="in the same folder reads a/two"):
        require_apart(one, two)
    require_apart(one, load_project(project / "finetune.yaml", Place(prefix=("three",))))


ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"is {n} a number?"},
            *[{"role": "assistant", "content": "yes"}],
        ]
    }
    for n in range(120)
]
TICKETS = dg.AssetKey(["analytics", "tickets"])


class Upstream:
    """A location with two projects and an asset whose table one of them trains on."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        data = yaml.safe_load((folder / "support/finetune.yaml").read_text())["data"]
        change(folder / "support", {"data": data | {"train": {"asset": "analytics/tickets"}}})
        self.store = ArtifactStore(folder / "support/.ft/store")
        self.folder, self.instance = folder, instance

    def run(self, made: dg.AssetsDefinition, *names: str) -> dg.ExecuteInProcessResult:
        defs = dg.Definitions.merge(load(self.folder), dg.Definitions([made]))
        ours = [dg.AssetKey(["ml", "support", name]) for name in names]
        if made.partitions_def is not None:  # a run has one kind of partitions
            for one in made.partitions_def.get_partition_keys():
                dg.materialize([made], partition_key=one, instance=self.instance)
        return defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance,
            asset_selection=ours if made.partitions_def else [TICKETS, *ours],
            raise_on_error=False,
        )

    def rows(self) -> list[str]:
        """Return the prompts of the raw dataset."""
        raw = self.store.need("raw_dataset", None)
        table = read_table(raw.path / "conversations.parquet", row=DataRow)
        return sorted(row["messages"][0]["content"] for row in table)


@pytest.fixture
def upstream(folder: Path, instance: dg.DagsterInstance) -> Upstream:
    return Upstream(folder, instance)


def tickets(make: Callable[[], Any], **options: Any) -> dg.AssetsDefinition:
    @dg.asset(key=TICKETS, **options)
    def table(context: dg.AssetExecutionContext) -> Any:
        return make()

    return table


def test_table_of_an_asset_is_read_by_content(upstream: Upstream, folder: Path) -> None:
    made = upstream.run(tickets(lambda: ROWS), "upstream_tables", "raw_dataset")
    assert made.success, failure(made)
    assert upstream.rows() == sorted(row["messages"][0]["content"] for row in ROWS)
    first = upstream.store.need("upstream_tables", None).fingerprint
    raw = upstream.store.need("raw_dataset", None).fingerprint
    upstream.run(tickets(lambda: list(ROWS)), "upstream_tables", "raw_dataset")
    assert upstream.store.need("upstream_tables", None).fingerprint == first
    assert upstream.store.need("raw_dataset", None).fingerprint == raw
    # The project's own location, where the asset cannot be loaded, keeps what was read last.
    steps = plan(
        load_project(folder / "support/finetune.yaml"),
        build,
        [dg.AssetKey(name) for name in ("upstream_tables", "raw_dataset")],
        "tiny",
    )
    assert [step.action for step in steps] == [REUSED, REUSED]
    # A new table is read before the rows: the order of one run is that of the graph.
    upstream.run(tickets(lambda: ROWS[:100]), "upstream_tables", "raw_dataset")
    assert len(upstream.rows()) == 100


def test_table_of_each_kind_is_read(upstream: Upstream, tmp_path: Path) -> None:
    import pandas as pd
    import pyarrow as pa

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:50]))
    flat = [{"prompt": f"q {n}", "completion": "yes"} for n in range(50)]
    days = dg.StaticPartitionsDefinition(["monday", "tuesday"])
    path = dg.MaterializeResult(metadata={"path": dg.MetadataValue.path(str(file))})
    kinds: list[tuple[dg.AssetsDefinition, int]] = [
        (tickets(lambda: pd.DataFrame(flat, index=range(7, 57))), 50),
        (tickets(lambda: pa.Table.from_pylist(flat[:40])), 40),
        (tickets(lambda: str(file)), 50),
        (tickets(lambda: path), 50),
        (tickets(lambda: flat[:45], partitions_def=days), 45),  # duplicates of the other day
    ]
    for made, count in kinds:
        run = upstream.run(made, "upstream_tables", "raw_dataset")
        assert run.success, failure(run)
        assert len(upstream.rows()) == count


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda: 7, "is a int, which is no table"),
        (lambda: [{"a": {1, 2}}], "cannot be written as a table"),
        (lambda: "/nowhere.jsonl", "which is no data file here"),
        (lambda: dg.MaterializeResult(metadata={"path": "/nowhere.csv"}), "which is not there"),
        (lambda: dg.MaterializeResult(), "cannot be loaded: "),
    ],
)
def test_asset_without_a_table_is_refused(
    upstream: Upstream, made: Callable[[], Any], found: str
) -> None:
    run = upstream.run(tickets(made), "upstream_tables", "raw_dataset")
    assert not run.success
    assert "{asset: analytics/tickets}" in failure(run) and found in failure(run)
    assert upstream.store.current("upstream_tables", None) is None


def test_asset_that_was_never_read_is_refused_where_it_cannot_be(upstream: Upstream) -> None:
    steps = plan(
        load_project(upstream.folder / "support/finetune.yaml"),
        build,
        [dg.AssetKey(name) for name in ("upstream_tables", "raw_dataset")],
        "tiny",
    )
    assert [step.action for step in steps] == [REFUSED, STOPPED]
    assert "was not read before" in steps[0].why[0]
