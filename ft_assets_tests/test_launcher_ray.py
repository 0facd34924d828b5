"""A real Ray cluster of this machine, two worker processes on its CPUs (gloo)."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_assets.config.launcher import RaySettings
from ft_assets.errors import ConfigError, InfrastructureFault, StepLost
from ft_assets.job import Job
from ft_assets.launchers import LocalLauncher
from ft_assets.launchers.local import free_port
from ft_assets.launchers.ray import RayLauncher
from ft_assets_tests.launching import (
    interrupted,
    process_groups,
    require_same_training,
    trained,
    training,
    training_job,
    wait_until,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head node with two CPUs, a process group of its own; yields its address."""
    port = free_port()
    head = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--port={port}",
            "--num-cpus=2",
            "--num-gpus=0",
            "--include-dashboard=false",
            "--disable-usage-stats",
            "--object-store-memory=100000000",
            "--node-ip-address=127.0.0.1",
        ],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"127.0.0.1:{port}"
    os.killpg(head.pid, signal.SIGKILL)  # the cluster of this test, all of it
    head.wait()


def launcher(cluster: str) -> RayLauncher:
    return RayLauncher(RaySettings(kind="ray", address=cluster, workers=2, use_gpu=False))


def workers() -> set[int]:
    """Return the processes that are training workers of Ray on this machine."""
    found = set[int]()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::" in (text := file.read_bytes()) and b"RayTrainWorker" in text:
                found.add(int(file.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("step", "there"),
    [("release", True), ("export", True), ("merge", True), ("base_model", False), ("push", False)],
)
def test_steps_that_load_models_to_answer_run_where_the_gpu_is(
    step: str, there: bool, tmp_path: Path
) -> None:
    job = Job(
        step=step,
        gpu=importlib.import_module(f"ft_assets.steps.{step}").Settings.STEP.gpu,
        asset=step,
        partition="x",
        fingerprint="x",
        settings={},
        inputs={},
        output=tmp_path,
        checkpoints=tmp_path,
        work=tmp_path,
    )
    assert (
        "ft_assets.launchers.ray_driver"
        in launcher("127.0.0.1:1").command(tmp_path / "job.json", job)
    ) is there


def test_two_workers_train_what_one_process_trains(
    finished: Path, tmp_path: Path, cluster: str
) -> None:
    alone, together = training_job(finished, tmp_path / "1"), training_job(finished, tmp_path / "2")
    trained(LocalLauncher(), alone)
    lines, curve, metrics = trained(launcher(cluster), together)
    require_same_training(alone, together)
    assert metrics["steps"] == len(curve) > 1
    assert [line["step"] for line in lines if line["message"] == "train"] == [
        entry["step"] for entry in curve
    ]


def test_users_error_arrives_as_it_was_raised(finished: Path, tmp_path: Path, cluster: str) -> None:
    with pytest.raises(
        ConfigError, match=r"sft.effective_batch: 8[\s\S]*micro_batch \(8\) x 2 ranks"
    ):
        launcher(cluster).run(training_job(finished, tmp_path, micro_batch=8), lambda _: None)


def test_lost_worker_is_a_fault_and_interrupt_stops_the_rest(
    finished: Path, tmp_path: Path, cluster: str
) -> None:
    job, killed = training_job(finished, tmp_path / "1", num_train_epochs=500), set[int]()

    def kill(line: object) -> None:
        if not killed and isinstance(line, dict) and line["message"] == "train":
            killed.update(workers())
            os.kill(min(killed), signal.SIGKILL)

    with pytest.raises(StepLost):
        launcher(cluster).run(job, kill)
    assert len(killed) == 2
    wait_until(lambda: not workers())

    job = training_job(finished, tmp_path / "2", num_train_epochs=500)
    with interrupted(lambda: wait_until(lambda: training(job))):
        launcher(cluster).run(job, lambda _: None)
    assert not process_groups(job.work)
    wait_until(lambda: not workers())


def test_cluster_that_does_not_answer_is_a_fault(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StepLost, match="does not answer"):
        RayLauncher(RaySettings(kind="ray", address=f"127.0.0.1:{free_port()}", use_gpu=False)).run(
            training_job(finished, tmp_path), lambda _: None
        )


def test_dead_queue_does_not_hide_what_the_run_came_to(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    import ray.train.torch
    import ray.util.queue
    from ray.exceptions import RayActorError

    from ft_assets.launchers import ray_driver

    class Dead:
        """What is left of a queue, and of a training, whose node has died."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def get(self) -> object:
            return ray_driver.END  # for the thread that listens

        def put(self, _: object) -> None:
            raise RayActorError

        def fit(self) -> None:
            raise RayActorError

    job = training_job(finished, tmp_path)
    job.work.mkdir()
    monkeypatch.setattr(ray.util.queue, "Queue", Dead)
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Dead)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    assert (
        ray_driver.run(job, RaySettings(kind="ray", workers=1, use_gpu=False))
        == InfrastructureFault.exit_code
    )
