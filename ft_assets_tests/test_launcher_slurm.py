"""Steps as jobs of a real Slurm cluster of this machine, and the states it cannot produce."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ft_assets.commands.doctor import launcher_check
from ft_assets.config.launcher import SlurmSettings
from ft_assets.errors import ConfigError, StepLost
from ft_assets.launchers import LocalLauncher
from ft_assets.launchers.base import failed
from ft_assets.launchers.cluster import Phase
from ft_assets.launchers.slurm import SlurmLauncher, job_state
from ft_assets_tests.launching import (
    interrupted,
    launched_elsewhere,
    process_groups,
    require_same_training,
    trained,
    training,
    training_job,
    wait_until,
)
from ft_assets_tests.slurm_cluster import slurm_cluster

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")):
        yield


def launcher(**options: Any) -> SlurmLauncher:
    return SlurmLauncher(
        SlurmSettings(
            **{"kind": "slurm", "gpus": 0, "poll_seconds": 0.3, "silence_seconds": 5, **options}
        )
    )


def queue() -> list[str]:
    return subprocess.run(
        ["squeue", "--noheader", "--format=%i"], capture_output=True, text=True, check=True
    ).stdout.split()


def test_jobs_train_what_one_process_trains(finished: Path, tmp_path: Path, cluster: None) -> None:
    alone = training_job(finished, tmp_path / "0")
    _, curve, _ = trained(LocalLauncher(), alone)
    for ranks in (1, 2):
        job = training_job(finished, tmp_path / str(ranks))
        lines, _, metrics = trained(launcher(tasks_per_node=ranks), job)
        require_same_training(alone, job)
        assert metrics["steps"] == len(curve) > 1
        assert [line["step"] for line in lines if line["message"] == "train"] == [
            entry["step"] for entry in curve
        ]
        assert any(line["message"] == "running: running" for line in lines)
    assert not queue()


def test_users_error_arrives_as_it_was_raised(
    finished: Path, tmp_path: Path, cluster: None
) -> None:
    with pytest.raises(ConfigError, match=r"sft.effective_batch: 8"):
        few = {"export": "PATH,PYTHONPATH,HF_HUB_OFFLINE,SLURM_CONF"}
        launcher(sbatch=few).run(training_job(finished, tmp_path, micro_batch=3), lambda _: None)


def test_killed_rank_is_a_fault_and_takes_the_other_with_it(
    finished: Path, tmp_path: Path, cluster: None
) -> None:
    job, killed = training_job(finished, tmp_path, num_train_epochs=500), list[int]()

    def kill(line: object) -> None:
        if not killed and isinstance(line, dict) and line["message"] == "train":
            killed.extend(steps(job.work))
            os.kill(killed[-1], signal.SIGKILL)

    with pytest.raises(StepLost, match="killed by signal 9"):
        launcher(nodes=2).run(job, kill)
    assert len(killed) == 2
    wait_until(lambda: not process_groups(job.work))


def test_interrupt_leaves_a_checkpoint_and_no_process(
    finished: Path, tmp_path: Path, cluster: None
) -> None:
    job = training_job(finished, tmp_path, num_train_epochs=500)
    with interrupted(lambda: wait_until(lambda: training(job))):
        launcher().run(job, lambda _: None)
    assert not queue()
    assert not process_groups(job.work)
    assert list(job.checkpoints.glob("checkpoint-*"))


def test_queued_job_says_why_and_is_cancelled_with_its_run(
    finished: Path, tmp_path: Path, cluster: None
) -> None:
    job, said = training_job(finished, tmp_path), list[str]()

    def cancel(line: Any) -> None:
        said.append(line["message"])
        if line["message"].startswith("queued: BeginTime"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher(sbatch={"begin": "now+1hour"}).run(job, cancel)
    assert said[0].startswith("submitted as ")
    assert not queue()


def test_job_ends_by_itself_when_its_launcher_is_killed(
    finished: Path, tmp_path: Path, cluster: None
) -> None:
    job = training_job(finished, tmp_path, num_train_epochs=500)
    parent = launched_elsewhere("launcher()", __name__, job, tmp_path)
    wait_until(lambda: training(job))
    parent.kill()
    parent.wait()
    assert queue()
    wait_until(lambda: not queue() and not process_groups(job.work))
    assert "no heartbeat from the run" in job.log_file.read_text()


def test_job_that_somebody_else_cancels_is_a_fault(
    finished: Path, tmp_path: Path, cluster: None
) -> None:
    def cancel(line: Any) -> None:
        if line["message"].startswith("queued: "):
            subprocess.run(["scancel", *queue()], check=True)

    with pytest.raises(StepLost, match="CANCELLED"):
        launcher(sbatch={"begin": "now+1hour"}).run(training_job(finished, tmp_path), cancel)


def test_what_slurm_refuses_is_told_with_its_key(
    finished: Path, tmp_path: Path, cluster: None
) -> None:
    job = training_job(finished, tmp_path)
    for options, key in (
        ({"partition": "gpu"}, r"launcher\.partition: gpu"),
        ({"gpus": 1}, r"launcher\.gpus: 1"),
        ({"time": "soon"}, r"launcher\.time: soon"),
        ({"nodes": 9}, r"launcher\.partition: the job can never start[\s\S]*'nodes': 9"),
        ({"time": "2:00:00"}, r"can never start[\s\S]*'time': '2:00:00'"),
        ({"sbatch": {"fast": True}}, r"launcher\.sbatch"),
    ):
        with pytest.raises(ConfigError, match=key):
            launcher(**options).run(job, lambda _: None)
    assert not queue()


def test_doctor_asks_whether_the_cluster_answers(tmp_path: Path, cluster: None) -> None:
    check = launcher_check(SlurmSettings(kind="slurm"), tmp_path)
    assert (check.state, check.found) == ("ok", "slurm answers: partitions main")
    with pytest.raises(ConfigError, match=r"launcher\.partition: gpu"):
        launcher_check(SlurmSettings(kind="slurm", partition="gpu"), tmp_path)


def test_one_task_judges_and_options_of_sbatch_win(finished: Path, tmp_path: Path) -> None:
    several = SlurmLauncher(
        SlurmSettings(
            kind="slurm",
            nodes=4,
            gpus=8,
            sbatch={"mem": "64G", "exclusive": True, "no-requeue": False},
        )
    )
    job = training_job(finished, tmp_path)
    options = several.options(job)
    assert {"--nodes=4", "--ntasks-per-node=8", "--gres=gpu:8", "--mem=64G", "--exclusive"} < set(
        options
    )
    assert "--no-requeue" not in options
    assert {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:1"} < set(
        several.options(job.model_copy(update={"step": "evaluate", "distributed": False}))
    )


def test_machine_without_slurm_is_told(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on this machine"):
        launcher().run(training_job(finished, tmp_path / "1"), lambda _: None)


def test_controller_that_does_not_answer_is_a_fault(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for sbatch: the real one asks a dead controller for minutes."""
    (tmp_path / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: Batch job submission failed: "
        "Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(StepLost, match="Unable to contact slurm controller"):
        launcher().run(training_job(finished, tmp_path / "1"), lambda _: None)


@pytest.mark.parametrize("state", ["NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "OUT_OF_MEMORY"])
def test_end_that_the_cluster_brought_about_is_a_fault(state: str) -> None:
    end = job_state(state, "None", 0, SlurmSettings(kind="slurm"))
    assert isinstance(failed("sft", end.exit_code, "", end.detail), StepLost)
    assert end.phase is Phase.ENDED


def test_time_limit_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"launcher\.time: 1:00:00[\s\S]*last checkpoint"):
        job_state("TIMEOUT", "TimeLimit", 0, SlurmSettings(kind="slurm", time="1:00:00"))


def steps(work: Path) -> list[int]:
    """Return the processes of this machine that are ranks of the job, not their wrappers."""
    return sorted(
        pid
        for pid in process_groups(work)
        if b"ft_assets.steps" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
