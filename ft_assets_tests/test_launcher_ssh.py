"""Steps on a host over a real sshd: what arrives, what is lost, and whether it is given back."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ft_assets.commands.doctor import launcher_check
from ft_assets.config.launcher import SshSettings
from ft_assets.errors import ConfigError, DataError, FtError, StepLost
from ft_assets.launchers import LocalLauncher, ssh_trees
from ft_assets.launchers.ssh import SshLauncher
from ft_assets_tests.launching import (
    interrupted,
    launched_elsewhere,
    require_same_training,
    trained,
    training_job,
    wait_until,
)
from ft_assets_tests.ssh_host import Host, count_job, ssh_host, with_count_step

pytestmark = pytest.mark.cluster


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(ssh_trees, "code_files", ssh_trees.code_files)  # to restore it
    with ssh_host(tmp_path / "host") as running:
        with_count_step(tmp_path)
        yield running
        assert not [text for text in running.processes() if "agent.py keep" not in text]


def counting(job: Any, number: int = 1) -> bool:
    """Return True if the job has counted so far, as this machine knows."""
    return job.progress_file.exists() and f'"number": {number}' in job.progress_file.read_text()


def elsewhere(host: Host, job: Any, **options: Any) -> "subprocess.Popen[bytes]":
    """Run the job by another process, which a test can kill."""
    settings = host.settings(**options).model_dump_json()
    folder = job.work.parent
    return launched_elsewhere(f"launcher_of({settings!r}, {str(folder)!r})", __name__, job, folder)


def launcher_of(settings: str, folder: str) -> SshLauncher:
    with_count_step(Path(folder))
    return SshLauncher(SshSettings.model_validate_json(settings))


def test_second_time_sends_nothing_and_idle_host_is_given_back(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOKEN", "hf_neverOnACommandLine")
    secret, sent = {"secrets": ["TEST_TOKEN"], "idle_minutes": 0.05}, []
    for price in (2.0, 3.0):
        job = count_job(tmp_path)
        launcher = host.launcher(price_per_hour=price, max_cost=9, **secret)
        result = launcher.run(job, lambda _: None)
        sent.append(launcher.link.sent)
        assert counting(job, 3)
        assert (job.output / "rows.txt").read_text() == "ROWS\n" * 200_000
        assert (job.output / "info/read.txt").read_text() == str(job.inputs["data"])
        assert "token 22" in job.log_file.read_text()
        assert result.metrics["counted"] == 3
        assert result.metrics["host_cost"] == pytest.approx(
            result.metrics["host_hours"] * price, abs=1e-3
        )
    assert sent[0] > 1_000_000
    assert sent[1] < 1000, "only names of what is there already"
    wait_until(host.returned.exists, 20)
    wait_until(lambda: not host.processes(), 10)
    texts = [path for path in (tmp_path / "host/there").rglob("*") if path.is_file()]
    assert not [path for path in texts if b"neverOnACommandLine" in path.read_bytes()]


def test_training_equals_the_one_of_this_machine(finished: Path, host: Host) -> None:
    folder = host.folder.parent
    here, there = (training_job(finished, folder / name) for name in ("here", "there"))
    trained(LocalLauncher(), here)
    lines, curve, _ = trained(host.launcher(), there)
    require_same_training(here, there)
    assert [line["step"] for line in lines if line["message"] == "train"] == [
        entry["step"] for entry in curve
    ]


def test_cut_connection_and_killed_keeper_cost_nothing(host: Host, tmp_path: Path) -> None:
    job, cut = count_job(tmp_path, steps=40, seconds=0.1), list[int]()

    def keepers() -> list[int]:
        return [pid for text, pid in host.processes().items() if "agent.py keep" in text]

    def progress(line: Any) -> None:
        if line["message"] == "count" and not cut:
            cut.extend(keepers())
            host.kill_keeper()
            host.cut()
            time.sleep(1)  # the step goes on meanwhile
            host.come_back()

    result = host.launcher(idle_minutes=0.02).run(job, progress)
    assert cut
    assert cut != keepers()
    assert result.metrics["begun"] == 0
    wait_until(host.returned.exists, 20)


def test_cancelled_step_leaves_its_checkpoints_here_and_gives_the_host_back(
    host: Host, tmp_path: Path
) -> None:
    job = count_job(tmp_path, steps=1000, seconds=0.1)
    with interrupted(lambda: wait_until(lambda: counting(job, 2))):
        host.launcher().run(job, lambda _: None)
    assert (job.checkpoints / "checkpoint-2").exists()
    wait_until(host.returned.exists, 10)
    wait_until(lambda: not host.processes(), 10)


def test_killed_run_finds_its_step_again(host: Host, tmp_path: Path) -> None:
    job = count_job(tmp_path, steps=40, seconds=0.1)
    run = elsewhere(host, job)
    wait_until(lambda: counting(job))
    run.kill()
    run.wait()
    lines = list[str]()
    again = job.model_copy(update={"work": tmp_path / "again"})
    result = host.launcher().run(again, lambda line: lines.append(str(line["message"])))
    assert lines.count("count") == 40
    assert "found again on 127.0.0.1" in lines
    assert result.metrics["begun"] == 0


def test_silent_run_ends_its_step_and_another_host_continues(host: Host, tmp_path: Path) -> None:
    job = count_job(tmp_path, steps=200, seconds=0.1)
    run = elsewhere(host, job, silence_seconds=4, checkpoint_minutes=0.005)
    wait_until(lambda: (job.checkpoints / "checkpoint-3").exists())
    run.kill()
    run.wait()
    wait_until(host.returned.exists, 30)
    wait_until(lambda: not host.processes(), 10)
    other = job.model_copy(
        update={"work": tmp_path / "other", "settings": {**job.settings, "steps": 12}}
    )
    for folder in job.checkpoints.glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > 12:
            shutil.rmtree(folder)
    result = host.launcher(folder=str(tmp_path / "host/other")).run(other, lambda _: None)
    assert 3 <= result.metrics["begun"] <= 12


def test_run_that_is_killed_while_it_sends_leaves_no_host_behind(
    host: Host, tmp_path: Path
) -> None:
    job = count_job(tmp_path)
    run = elsewhere(host, job, silence_seconds=3)
    wait_until((host.folder / "there/lease.json").exists)
    run.kill()
    run.wait()
    wait_until(host.returned.exists, 20)
    wait_until(lambda: not host.processes(), 10)
    again = job.model_copy(update={"work": tmp_path / "again"})
    assert host.launcher().run(again, lambda _: None).metrics["counted"] == 3


def test_process_that_is_killed_there_is_a_fault(host: Host, tmp_path: Path) -> None:
    job, killed = count_job(tmp_path, steps=300, seconds=0.1), list[int]()

    def kill(line: Any) -> None:
        if line["message"] == "count" and not killed:
            killed.extend(
                pid
                for text, pid in host.processes().items()
                if " ft_assets.launchers.node " in text
            )
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(StepLost, match="signal 9"):
        host.launcher(idle_minutes=0.02).run(job, kill)
    assert killed
    assert (job.checkpoints / "checkpoint-1").exists()
    wait_until(host.returned.exists, 20)
    wait_until(lambda: not host.processes(), 10)


def test_budget_ends_the_step_with_its_checkpoints_here(host: Host, tmp_path: Path) -> None:
    job, lease = count_job(tmp_path, steps=1000, seconds=0.1), host.folder / "there/lease.json"

    def let_hours_pass(line: Any) -> None:
        if line["message"] == "count":
            known = json.loads(lease.read_text())
            lease.write_text(json.dumps({**known, "since": time.time() - 3 * 3600}))

    cap = {"price_per_hour": 2, "max_cost": 6}
    with pytest.raises(ConfigError, match="max_cost 6") as caught:
        host.launcher(**cap).run(job, let_hours_pass)
    assert "resumes from the last checkpoint" in caught.value.fix
    assert (job.checkpoints / "checkpoint-1").exists()
    wait_until(host.returned.exists, 10)
    wait_until(lambda: not host.processes(), 10)


def test_wrong_host_key_is_refused_before_anything_is_sent(host: Host, tmp_path: Path) -> None:
    host.known(tmp_path / "host/user_key.pub")
    with pytest.raises(ConfigError, match="known_hosts"):
        host.launcher().run(count_job(tmp_path), lambda _: None)
    assert not (tmp_path / "host/there").exists()


def test_host_without_rsync_or_environment(host: Host, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "mkdir", "cat", "mv", "python3"):
        (tools / name).symlink_to(str(shutil.which(name)))
    with ssh_host(tmp_path / "bare", str(tools)) as bare:
        with pytest.raises(ConfigError, match="rsync is not installed there"):
            bare.launcher().run(count_job(tmp_path), lambda _: None)
        with pytest.raises(ConfigError, match=r"set launcher\.python"):
            bare.launcher(python="/nowhere/python").run(count_job(tmp_path), lambda _: None)
        wait_until(bare.returned.exists, 10)
        wait_until(lambda: not bare.processes(), 10)


def test_damaged_files_are_sent_and_fetched_again_after_a_users_error(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = host.launcher()
    with pytest.raises(DataError, match=r"127\.0\.0\.1: steps: 0"):
        launcher.run(count_job(tmp_path, steps=0), lambda _: None)
    for blob in (host.folder / "there/blobs").iterdir():  # a disk of the host fails
        if blob.stat().st_size > 500_000:
            blob.chmod(0o600)
            blob.write_bytes(b"?" * blob.stat().st_size)
    pull, tries = launcher.link.pull, []

    def damaging(there: str, folder: Path, *options: str) -> None:
        pull(there, folder, *options)
        if there.endswith("output"):
            tries.append(there)
            if len(tries) != 2:
                (folder / "rows.txt").write_text("damaged")

    monkeypatch.setattr(launcher.link, "pull", damaging)
    job = count_job(tmp_path)
    launcher.run(job, lambda _: None)
    assert len(tries) == 2
    assert (job.output / "rows.txt").read_text().startswith("ROWS")
    monkeypatch.setattr(launcher, "cluster_settings", host.settings(patience_seconds=0.1))
    with pytest.raises(StepLost, match="arrives damaged"):
        launcher.run(count_job(tmp_path), lambda _: None)


def test_full_disk_there(host: Host, tmp_path: Path) -> None:
    small = tmp_path / "host/small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine does not permit a small file system")
    try:
        folder = {"folder": str(small / "there")}
        for megabytes in (20, 0):
            with pytest.raises(FtError, match=r"(?i)no space|disk is full") as caught:
                host.launcher(**folder).run(
                    count_job(tmp_path, megabytes=megabytes), lambda _: None
                )
            assert "127.0.0.1" in str(caught.value)
            with contextlib.suppress(OSError), (small / "filler").open("wb", 0) as file:
                file.write(b"x" * 6_000_000)
        wait_until(host.returned.exists, 20)
        wait_until(lambda: "small" not in str(host.processes()), 10)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_environment_is_made_from_the_lock(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = ssh_trees.lock()
    assert {"torch", "numpy", "s3transfer", "aiohttp", "pydantic-core"} - {
        line.partition("==")[0] for line in lock
    } == {"s3transfer"}, "all that the package needs, and no extra"
    launcher = host.launcher(python=None)
    made = [
        launcher.link.install(),
        launcher.link.call("environment", {"lock": []}, 100)["python"],
        launcher.link.call("environment", {"lock": []}, 100)["python"],
    ]
    assert Path(str(made[1])).exists()
    assert made[1] == made[2]
    with pytest.raises(ConfigError, match="No matching distribution"):
        monkeypatch.setattr(ssh_trees, "lock", list)
        launcher.link.call("environment", {"lock": ["ft-no-such-library==1"]}, 100)


def test_other_library_there_is_refused(host: Host, tmp_path: Path) -> None:
    launcher = host.launcher()
    call = launcher.link.call

    def other(verb: str, *given: Any) -> Any:
        answer = call(verb, *given)
        changed = {"versions": answer["versions"] | {"peft": "0.1"}} if verb == "hello" else {}
        return answer | changed

    launcher.link.call = other  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"peft 0\.1\n  expected: peft "):
        launcher.run(count_job(tmp_path), lambda _: None)


def test_doctor_and_keys_that_contradict(host: Host) -> None:
    check = launcher_check(host.settings(max_hours=3), Path())
    assert "GB free; it is given back by stop_command, after 3.0 hours at most" in check.found
    for keys in ({"max_cost": 5}, {"max_cost": 5, "price_per_hour": 1, "stop_command": None}):
        with pytest.raises(ValueError, match="max_cost needs"):
            host.settings(**keys)
    assert host.settings(max_cost=5, price_per_hour=2, max_hours=3).hours == 2.5
