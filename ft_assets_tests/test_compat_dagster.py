"""The hooks into Dagster have the shape we rely on.

A failure here after an upgrade means: read Dagster's change, mend the hook in
ft_assets/compat/dagster.py, then raise the upper bound in pyproject.toml.
"""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.code_pointer import FileCodePointer
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin

from ft_assets.compat import dagster as hooks
from ft_assets.compat.dagster_at_rest import sleep_while_a_pool_is_full
from ft_assets.config import Place
from ft_assets.errors import ConfigError

ROOT = Path(__file__).parents[1]
RUN = "0f8fad5b-d9cb-469f-a165-70867728950e"
JOBS = """
from pathlib import Path

import dagster as dg


@dg.op
def make():
    Path(__file__).with_name("made").touch()


@dg.job
def nothing():
    make()
"""


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_only_the_compat_modules_import_private_parts_of_dagster() -> None:
    private = (
        "dagster._core",
        "dagster._cli",
        "dagster._daemon",
        "dagster._grpc",
        "dagster._serdes",
        "dagster._utils",
    )
    users = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "ft_assets").rglob("*.py")
        if any(name in file.read_text() for name in private)
    }
    compat = ("dagster", "dagster_at_rest", "dagster_services")
    assert users == {f"ft_assets/compat/{name}.py" for name in compat}


def test_run_launcher_has_the_methods_that_ours_overrides() -> None:
    launcher = hooks.RunLauncher
    assert launcher.__abstractmethods__ == {"launch_run", "terminate"}
    assert parameters(launcher.launch_run) == ["self", "context"]
    assert parameters(launcher.terminate) == ["self", "run_id"]
    assert parameters(launcher.check_run_worker_health) == ["self", "run"]
    assert isinstance(launcher.supports_check_run_worker_health, property)


def test_launch_context_has_what_a_worker_needs() -> None:
    assert isinstance(hooks.LaunchRunContext.job_code_origin, property)
    assert "dagster_run" in hooks.LaunchRunContext._fields


def test_configurable_class_has_the_methods_that_ours_overrides() -> None:
    assert hooks.ConfigurableClass.__abstractmethods__ == {
        "inst_data",
        "config_type",
        "from_config_value",
    }


def test_health_result_takes_what_ours_gives_it() -> None:
    result = hooks.CheckRunHealthResult(hooks.WorkerStatus.RUNNING, "fine", run_worker_id="7")
    assert (result.status.value, result.msg, result.run_worker_id) == ("RUNNING", "fine", "7")
    assert {"RUNNING", "FAILED"} <= {status.value for status in hooks.WorkerStatus}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def context_of(tmp_path: Path, **origin: Any) -> hooks.LaunchRunContext:
    """Build the context that a run launcher gets for a run of a job in a file."""
    pointer = FileCodePointer(str(tmp_path / "jobs.py"), "nothing", str(tmp_path))
    repository = RepositoryPythonOrigin(
        executable_path="/opt/python", code_pointer=pointer, container_image=None, **origin
    )
    run = dg.DagsterRun(
        job_name="nothing", run_id=RUN, job_code_origin=JobPythonOrigin("nothing", repository)
    )
    return hooks.LaunchRunContext(dagster_run=run, workspace=None)


def test_worker_reads_the_run_and_the_instance_that_the_launcher_wrote(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    argument, python = hooks.write_run(context_of(tmp_path), instance)
    assert python == "/opt/python"
    run = hooks.read_run(argument)
    assert run == hooks.LaunchedRun(RUN, instance.get_ref())
    with hooks.open_instance(run) as opened:
        assert opened.root_directory == instance.root_directory


def test_run_without_a_code_location_is_refused(instance: dg.DagsterInstance) -> None:
    run = dg.DagsterRun(job_name="nothing", run_id=RUN)
    with pytest.raises(ValueError, match="does not name its code location"):
        hooks.write_run(hooks.LaunchRunContext(dagster_run=run, workspace=None), instance)


@pytest.mark.slow
def test_worker_executes_the_run_that_it_is_given(tmp_path: Path) -> None:
    """A process that executes a run, as the worker does: the job writes a file."""
    (tmp_path / "jobs.py").write_text(JOBS)
    script = (
        "import sys; from ft_assets.compat.dagster import execute_run; execute_run(sys.argv[1])"
    )
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        context = context_of(tmp_path)
        instance.add_run(context.dagster_run.with_status(dg.DagsterRunStatus.STARTING))
        argument, _ = hooks.write_run(context, instance)
        done = subprocess.run(
            [sys.executable, "-c", script, argument], cwd=tmp_path, capture_output=True, text=True
        )
        assert (tmp_path / "made").exists(), done.stderr
        finished = instance.get_run_by_id(RUN)
        assert finished and finished.status == dg.DagsterRunStatus.SUCCESS


def test_services_share_what_dagster_gives_each_of_them() -> None:
    from dagster._core.remote_representation.grpc_server_registry import GrpcServerRegistry
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._daemon import controller
    from dagster._grpc import client, server
    from grpc import _common

    assert "grpc_server_registry" in parameters(WorkspaceProcessContext)
    assert "grpc_server_registry" in parameters(controller.DagsterDaemonController)
    assert parameters(GrpcServerRegistry.get_grpc_server_entry)[1:] == ["code_location_origin"]
    assert "client.heartbeat" in inspect.getsource(client.client_heartbeat_thread)
    assert "CLIENT_HEARTBEAT_INTERVAL" in inspect.getsource(client.client_heartbeat_thread)
    assert "wait_for_termination" in inspect.getsource(server.DagsterGrpcServer.serve)
    assert _common.MAXIMUM_WAIT_TIMEOUT < 1  # a second saves something


def test_queries_of_one_file_share_an_engine(tmp_path: Path) -> None:
    code = """
import dagster as dg
from ft_assets.compat.dagster_at_rest import reuse_engines
reuse_engines()
from sqlalchemy.engine import create as made
count = []
real = made.create_engine
from dagster._core.storage.runs.sqlite import sqlite_run_storage as storage
with dg.DagsterInstance.local_temp() as instance:
    with instance.run_storage.connect() as one, instance.run_storage.connect() as two:
        assert one.engine is two.engine
    before = instance.get_runs_count()
    graph = dg.GraphDefinition(name="none")
    instance.create_run_for_job(dg.JobDefinition(graph_def=graph))
    assert instance.get_runs_count() == before + 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_run_that_waits_for_a_pool_sleeps_until_its_next_look() -> None:
    from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext

    sleep_while_a_pool_is_full()
    with dg.DagsterInstance.local_temp() as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 1)
        first, second = (
            instance.create_run_for_job(dg.JobDefinition(graph_def=dg.GraphDefinition(name="none")))
            for _ in range(2)
        )
        with (
            InstanceConcurrencyContext(instance, first) as has,
            InstanceConcurrencyContext(instance, second) as waits,
        ):
            assert waits.interval_to_next_pending_claim_check() == 0
            assert has.claim("gpu", "train")
            assert not waits.claim("gpu", "train")
            assert 0.5 < waits.interval_to_next_pending_claim_check() <= 1


def test_instance_that_a_command_of_dagster_deletes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from dagster._cli.utils import get_possibly_temporary_instance_for_cli

    from ft_assets.orchestration.instance import require_kept

    project: Any = SimpleNamespace(root=tmp_path, place=Place())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    with (
        get_possibly_temporary_instance_for_cli("dagster asset materialize") as deleted,
        pytest.raises(ConfigError, match=f"export DAGSTER_HOME={tmp_path}/.ft/dagster"),
    ):
        require_kept(deleted, project)
    (tmp_path / ".ft" / "dagster").mkdir(parents=True)
    (tmp_path / ".env").write_text(f"DAGSTER_HOME={tmp_path}/.ft/dagster\n")
    with get_possibly_temporary_instance_for_cli("dagster asset materialize") as kept:
        require_kept(kept, project)  # as the fix says
    require_kept(dg.DagsterInstance.ephemeral(), project)  # of a test
