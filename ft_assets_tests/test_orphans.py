"""Runs whose process or daemon died are found, reported and resumed; living runs are left alone.

A real webserver and daemon run with deploy/dagster.yaml, with shorter intervals and SQLite. The
asset is tiny. Its step is a child process of the real launcher, in the pool `gpu` of size one.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest
import yaml
from dagster._core.code_pointer import FileCodePointer
from dagster._core.launcher import LaunchRunContext, WorkerStatus
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._daemon.monitoring.run_monitoring import monitor_starting_run

from ft_assets.config import load_project
from ft_assets.runs import ProcessRunLauncher
from ft_assets.runs.in_process import end_dead_runs
from ft_assets.runs.process import TAG, RunProcess
from ft_assets_tests.launching import stop_services
from ft_assets_tests.test_launcher_local import gone

pytestmark = pytest.mark.graph

DEPLOY = Path(__file__).parent.parent / "deploy/dagster.yaml"
MONITORING = {"poll_interval_seconds": 1, "free_slots_after_run_end_seconds": 2}
LOCATION = """
import os
from pathlib import Path

import dagster as dg

from ft_assets.job import Job
from ft_assets_tests.test_launcher_local import ScriptLauncher

folder = Path(__file__).parent


@dg.asset(pool="gpu")
def trained(context: dg.AssetExecutionContext) -> None:
    ScriptLauncher().run(
        Job(
            step="test", asset="trained", partition=None, fingerprint="0", settings={},
            inputs={"script": folder / "step.py"}, output=folder / "output",
            checkpoints=folder / "checkpoints", work=folder / context.run_id,
        ),
        lambda _: None,
    )


defs = dg.Definitions(assets=[trained], executor=dg.in_process_executor)
"""
# Each try writes its process ids, resumes from the last checkpoint, and ends when the file exists.
STEP = """
import os, subprocess, sys, time
from ft_assets.job import StepResult
from ft_assets.step_runner import main

def step(job, report):
    job.checkpoints.mkdir(exist_ok=True)
    begun = len(list(job.checkpoints.iterdir()))
    wait = "import sys; sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE)
    (job.work / "half").write_text(f"{os.getpid()} {child.pid} {begun}")
    (job.work / "half").rename(job.work / "pids")
    try:
        while not (job.checkpoints.parent / "finish").exists():
            time.sleep(0.1)
    finally:
        (job.checkpoints / f"step-{begun + 1}").touch()
    return StepResult({"answer": 42})

main(step)
"""
LAUNCH = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename
 ... on LaunchRunSuccess { run { runId } }
 ... on PythonError { message } ... on PipelineNotFoundError { message } } }"""
CANCEL = """mutation($id: String!) { terminateRun(runId: $id) { __typename
 ... on TerminateRunFailure { message } ... on PythonError { message } } }"""


def until(what: Callable[[], Any], seconds: float = 90) -> Any:
    """Return the first true value of `what`. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise TimeoutError(what)


def instance_in(home: Path, **monitoring: int) -> dg.DagsterInstance:
    """Return an instance with deploy/dagster.yaml, except for Postgres and the intervals."""
    settings = yaml.safe_load(DEPLOY.read_text())
    del settings["storage"]
    settings["run_monitoring"] |= {**MONITORING, **monitoring}
    settings["run_queue"] = {"dequeue_interval_seconds": 1}
    home.mkdir()
    (home / "dagster.yaml").write_text(yaml.safe_dump(settings))
    return dg.DagsterInstance.from_config(str(home))


class Services:
    """Webserver and daemon of the tiny graph."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "location.py").write_text(LOCATION)
        (folder / "step.py").write_text(STEP)
        self.instance = instance_in(folder / "home")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.web = self._start("dagster_webserver", "-h", "127.0.0.1", "-p", str(self.port))
        until(lambda: self._up() or self.web.poll() is not None)
        self.daemon = self.start_daemon()

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "DAGSTER_HOME": str(self.folder / "home"),
            "DAGSTER_EVENT_LOG_CONSUMER_DAEMON_INTERVAL_SECONDS": "1",
        }
        line = [sys.executable, "-m", module, *arguments, "-f", str(self.folder / "location.py")]
        with (self.folder / f"{module}.log").open("ab") as log:
            return subprocess.Popen(
                line,
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _up(self) -> bool:
        try:
            return bool(self.ask("{ assetNodes { id } }")["assetNodes"])
        except (httpx.HTTPError, json.JSONDecodeError):
            return False

    def start_daemon(self) -> subprocess.Popen[bytes]:
        self.daemon = self._start("dagster._daemon", "run")
        return self.daemon

    def kill_daemon(self) -> None:
        """Kill it as a crash does."""
        self.daemon.kill()
        self.daemon.wait()

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        body = {"query": query, "variables": variables}
        return httpx.post(f"http://127.0.0.1:{self.port}/graphql", json=body, timeout=60).json()[
            "data"
        ]

    def launch(self) -> str:
        """Launch the asset as the UI does; return the run's id."""
        selector = {
            "repositoryLocationName": "location.py",
            "repositoryName": "__repository__",
            "jobName": "__ASSET_JOB",
        }
        params = {
            "selector": {**selector, "assetSelection": [{"path": ["trained"]}]},
            "mode": "default",
            "runConfigData": {},
        }
        answer = self.ask(LAUNCH, p=params)["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def status(self, run_id: str) -> dg.DagsterRunStatus:
        return self.run(run_id).status

    def run(self, run_id: str) -> dg.DagsterRun:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run

    def worker(self, run_id: str) -> RunProcess:
        process = RunProcess.of(run_id, self.run(run_id).tags)
        assert process is not None
        return process

    def step(self, run_id: str) -> list[int]:
        """Wait for a run's step; return its pid, its child's pid and its number of checkpoints."""
        pids = self.folder / run_id / "pids"
        until(pids.exists)
        return [int(number) for number in pids.read_text().split()]

    def retry(self, run_id: str) -> str:
        """Return the id of the run that was started in a run's place."""
        return until(lambda: self.run(run_id).tags.get("dagster/auto_retry_run_id"))

    def finish(self, *run_ids: str) -> None:
        """Let the steps end, and see their runs end well."""
        (self.folder / "finish").touch()
        for run_id in run_ids:
            until(lambda run_id=run_id: self.run(run_id).is_finished)
            assert self.status(run_id) == dg.DagsterRunStatus.SUCCESS, self.said(run_id)
        (self.folder / "finish").unlink()

    def said(self, run_id: str) -> str:
        return "\n".join(
            entry.message or str(entry.dagster_event) for entry in self.instance.all_logs(run_id)
        )

    def slots(self) -> set[str]:
        """Return the runs that hold the pool."""
        return set(self.instance.event_log_storage.get_concurrency_info("gpu").active_run_ids)

    def stop(self) -> None:
        stop_services(self.daemon, self.web)
        self.instance.dispose()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    running = Services(tmp_path_factory.mktemp("orphans"))
    yield running
    running.stop()


def test_run_that_was_lost_with_its_daemon_starts_again_from_its_checkpoint_and_the_queue_is_kept(
    services: Services,
) -> None:
    lost = services.launch()
    step, _, before = services.step(lost)
    assert services.slots() == {lost}
    services.kill_daemon()
    os.kill(
        services.worker(lost).pid, signal.SIGKILL
    )  # as a machine that goes down ends all of them
    queued = services.launch()
    assert gone(step)
    assert (services.status(lost), services.status(queued)) == (
        dg.DagsterRunStatus.STARTED,
        dg.DagsterRunStatus.QUEUED,
    )
    assert services.slots() == {lost}
    services.start_daemon()
    until(lambda: services.status(lost) == dg.DagsterRunStatus.FAILURE)
    assert "exited unexpectedly" in services.said(lost)
    again = services.retry(lost)
    until(lambda: services.slots() <= {again, queued})
    services.finish(again, queued)
    assert services.step(again)[2] > before
    until(lambda: not services.slots())


def test_run_outlives_its_daemon_and_a_cancel_then_frees_the_gpu(services: Services) -> None:
    run = services.launch()
    step, child, _ = services.step(run)
    process = services.worker(run)
    services.kill_daemon()  # the run's process is nobody's child any more
    log, looks = services.folder / "dagster._daemon.log", f"Checking run {run}"
    seen = log.read_text().count(looks)
    services.start_daemon()
    until(lambda: log.read_text().count(looks) >= seen + 2)
    assert services.status(run) == dg.DagsterRunStatus.STARTED
    assert services.worker(run) == process
    begun = time.monotonic()
    assert services.ask(CANCEL, id=run)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    assert gone(step, 30)
    assert gone(child, 30)
    until(lambda: services.run(run).is_finished and not services.slots(), 30)
    assert time.monotonic() - begun < 30
    assert services.status(run) == dg.DagsterRunStatus.CANCELED, services.said(run)
    assert services.run(run).tags.get("dagster/auto_retry_run_id") is None


def test_killed_process_is_told_at_once_and_an_interrupt_of_everything_loses_nothing(
    services: Services,
) -> None:
    killed = services.launch()
    services.step(killed)
    os.kill(services.worker(killed).pid, signal.SIGKILL)
    until(lambda: services.status(killed) == dg.DagsterRunStatus.FAILURE)
    assert "was killed by signal 9" in services.said(killed)
    interrupted = services.retry(killed)
    *_, before = services.step(interrupted)
    os.killpg(services.daemon.pid, signal.SIGINT)  # Ctrl-C at its terminal
    until(lambda: services.status(interrupted) == dg.DagsterRunStatus.FAILURE)
    services.daemon.wait(30)
    services.start_daemon()
    last = services.retry(interrupted)
    assert services.step(last)[2] > before
    services.finish(last)


@dg.op
def nothing() -> None:
    pass


@dg.job
def small() -> None:
    nothing()


def started(instance: dg.DagsterInstance, **changes: Any) -> tuple[dg.DagsterRun, RunProcess]:
    """Return a started run that says it is this test's process, but for what is changed."""
    run = instance.create_run_for_job(small, status=dg.DagsterRunStatus.STARTED)
    process = RunProcess.this(run.run_id).model_copy(update=changes)
    instance.add_run_tags(run.run_id, {TAG: process.model_dump_json()})
    return reloaded(instance, run), process


def reloaded(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRun:
    """Return a run as it is stored now."""
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    with instance_in(tmp_path_factory.mktemp("instance") / "home", start_timeout_seconds=1) as made:
        yield made


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, WorkerStatus.RUNNING),
        ({"started": 1}, WorkerStatus.FAILED),  # the number was given out again
        (
            {"boot": "another"},
            WorkerStatus.FAILED,
        ),  # number and clock as it happens: the machine was restarted
        ({"host": "another"}, WorkerStatus.RUNNING),  # not seen from here: it may well live
        ({"host": "another", "boot": "another"}, WorkerStatus.RUNNING),
        ({"run_id": "the one before"}, WorkerStatus.RUNNING),  # inherited: says nothing of this run
    ],
)
def test_only_a_process_that_has_certainly_ended_is_called_dead(
    instance: dg.DagsterInstance, changes: dict[str, Any], status: WorkerStatus
) -> None:
    assert isinstance(instance.run_launcher, ProcessRunLauncher)
    assert instance.run_launcher.supports_check_run_worker_health
    run, _ = started(instance, **changes)
    assert instance.run_launcher.check_run_worker_health(run).status == status


def test_ended_process_is_dead_also_while_its_parent_has_not_looked() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    process = RunProcess.this("run").model_copy(update={"pid": child.pid, "started": ticks})
    assert process.alive
    child.kill()
    until(lambda: not process.alive, 20)
    child.wait()
    assert not process.alive
    assert not process.terminate()


def test_cancel_of_a_dead_run_ends_it_and_hits_no_other_process(
    instance: dg.DagsterInstance,
) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run, _ = started(instance, pid=bystander.pid, started=1)
    assert instance.run_launcher.terminate(run.run_id)
    assert reloaded(instance, run).status == dg.DagsterRunStatus.CANCELED
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_the_next_ft_run_ends_what_a_killed_one_left_and_frees_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with instance_in(tmp_path / "home") as instance:
        dead, _ = started(instance, started=1)
        alive, _ = started(instance)
        slots = instance.event_log_storage
        slots.initialize_concurrency_limit_to_default("gpu")
        assert slots.claim_concurrency_slot("gpu", dead.run_id, "step").is_claimed
        waited: list[float] = []
        monkeypatch.setattr("ft_assets.runs.in_process.time.sleep", waited.append)
        assert end_dead_runs(instance) == [dead.run_id]
        assert (reloaded(instance, dead).status, reloaded(instance, alive).status) == (
            dg.DagsterRunStatus.FAILURE,
            dg.DagsterRunStatus.STARTED,
        )
        assert slots.get_concurrency_info("gpu").active_slot_count == 0
        assert end_dead_runs(instance) == []
        assert waited == []  # it said nothing yet: it has no step
        dead, _ = started(instance, started=1)
        instance.report_engine_event("a step trains", dead)
        assert end_dead_runs(instance) == [dead.run_id]
        assert 0 < waited[0] <= 40
        assert "was killed just now" in capsys.readouterr().err


def test_run_that_its_daemon_was_about_to_start_is_tried_again(
    instance: dg.DagsterInstance,
) -> None:
    run = instance.create_run_for_job(small)
    instance.report_dagster_event(
        dg.DagsterEvent("PIPELINE_STARTING", small.name), run.run_id
    )  # the daemon died here
    time.sleep(1.1)
    record = instance.get_run_record_by_id(run.run_id)
    assert record is not None
    monitor_starting_run(instance, record, logging.getLogger())
    assert reloaded(instance, run).status == dg.DagsterRunStatus.FAILURE
    assert reloaded(instance, run).tags["dagster/will_retry"] == "true"


def test_process_that_cannot_begin_fails_its_run_at_once(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    code = RepositoryPythonOrigin("/bin/false", FileCodePointer("gone.py", "small", str(tmp_path)))
    run = instance.create_run_for_job(
        small, status=dg.DagsterRunStatus.STARTING, job_code_origin=JobPythonOrigin("small", code)
    )
    instance.run_launcher.launch_run(LaunchRunContext(run, None))
    until(lambda: reloaded(instance, run).status == dg.DagsterRunStatus.FAILURE, 30)
    assert "exit code 1" in "".join(
        entry.message or str(entry.dagster_event) for entry in instance.all_logs(run.run_id)
    )


def test_ui_on_one_machine_has_the_same_safety(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_assets.orchestration.instance import dagster_home

    monkeypatch.setenv("DAGSTER_HOME", str(project / "home"))
    written = yaml.safe_load(
        (dagster_home(load_project(project / "finetune.yaml")) / "dagster.yaml").read_text()
    )
    shipped = yaml.safe_load(DEPLOY.read_text())
    assert written["run_launcher"] == shipped["run_launcher"]
    assert written["run_retries"] == shipped["run_retries"]
    assert written["run_monitoring"].items() <= shipped["run_monitoring"].items()
    assert (
        written["run_monitoring"]["free_slots_after_run_end_seconds"] > 30
    )  # what a killed process leaves has so long for its checkpoint
