"""The local launcher: progress, exit codes, a stop that leaves no process, and the lifeline."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_assets.errors import StepFailed
from ft_assets.job import Job
from ft_assets.launchers import LocalLauncher
from ft_assets.launchers.forking import ForkServer
from ft_assets.launchers.local import step_environment
from ft_assets_tests.launching import interrupted, launched_elsewhere, process_groups

STEP = """
import os, subprocess, sys, time
from pathlib import Path
from ft_assets.job import StepResult
from ft_assets.step_runner import main

def step(job, report):
    report("begun", step=1.0)
    if job.settings["how"] == "crash":
        print("the last words"); os._exit(7)
    if job.settings["how"] == "wait":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(job.work, "pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    return StepResult({"answer": 42})

main(step)
"""


class ScriptLauncher(LocalLauncher):
    """Starts a step of the test, in a fresh process; all else is the real launcher."""

    def command(self, job_file: Path, job: Job) -> list[str]:
        return [sys.executable, str(job.inputs["script"]), str(job_file)]


class ModuleLauncher(LocalLauncher):
    """Starts the same step as a module of the working directory, which can be forked."""

    def command(self, job_file: Path, job: Job) -> list[str]:
        return [sys.executable, "-m", job.inputs["script"].stem, str(job_file)]


@pytest.fixture(params=["fresh", "forked"])
def launcher(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Yield an expression for a launcher. A step is a fresh process or a forked one."""
    if request.param == "fresh":
        yield "ScriptLauncher()"
        return
    server = ForkServer(["ft_assets.step_runner"], step_environment())
    monkeypatch.setenv("FT_STEP_SERVER", server.address)
    monkeypatch.delenv("FT_FRESH_STEPS", raising=False)
    monkeypatch.chdir(tmp_path)
    yield "ModuleLauncher()"
    server.close()


def require_forked(launcher: str, pid: int) -> None:
    """Check that a step was started as the launcher's name says."""
    forked = b"ft_assets.launchers.fork_server" in parent_command(pid)
    assert forked == (launcher == "ModuleLauncher()")


def parent_command(pid: int) -> bytes:
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return Path(f"/proc/{parent}/cmdline").read_bytes()


def job(folder: Path, how: str) -> Job:
    script = folder / "step.py"
    script.write_text(STEP)
    return Job(
        step="test",
        asset="test",
        partition=None,
        fingerprint="0",
        settings={"how": how},
        inputs={"script": script},
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        work=folder / "work",
    )


def wait_for(path: Path, seconds: float = 60) -> list[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and len(path.read_text().split()) == 2:
            return [int(pid) for pid in path.read_text().split()]
        time.sleep(0.1)
    raise TimeoutError(path)


def gone(pid: int, seconds: float = 60) -> bool:
    """Return whether a process ends (or is a zombie that only waits to be counted)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_progress_and_result_arrive(launcher: str, tmp_path: Path) -> None:
    seen: list[dict] = []
    result = eval(launcher).run(job(tmp_path, "return"), lambda line: seen.append(dict(line)))
    assert result.metrics["answer"] == 42
    assert result.metrics["peak_memory_gb"] > 0
    assert [(line["message"], line["step"]) for line in seen] == [("begun", 1.0)]


def test_crash_is_told_with_its_exit_code_and_last_lines(launcher: str, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"exit code 7[\s\S]*the last words"):
        eval(launcher).run(job(tmp_path, "crash"), lambda _: None)


def test_interrupt_stops_the_step_and_its_children(launcher: str, tmp_path: Path) -> None:
    pids: list[int] = []

    def begun() -> None:
        pids.extend(wait_for(tmp_path / "work/pids"))
        require_forked(launcher, pids[0])

    with interrupted(begun):
        eval(launcher).run(job(tmp_path, "wait"), lambda _: None)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_step_ends_when_its_launcher_is_killed(launcher: str, tmp_path: Path) -> None:
    the_job = job(tmp_path, "wait")
    parent = launched_elsewhere(launcher, __name__, the_job, tmp_path)
    step, child = wait_for(tmp_path / "work/pids")
    require_forked(launcher, step)
    parent.kill()
    parent.wait()
    assert gone(step)
    # The step is responsible for its own child; a killed launcher cannot signal any process.
    os.kill(child, signal.SIGKILL)


def test_running_step_is_found_by_its_command_line(launcher: str, tmp_path: Path) -> None:
    """`ft gc` finds in this way the jobs that run."""
    parent = launched_elsewhere(launcher, __name__, job(tmp_path, "wait"), tmp_path)
    step, child = wait_for(tmp_path / "work/pids")
    assert process_groups(tmp_path / "work") == {step}
    assert os.getpgid(step) == step
    parent.send_signal(signal.SIGINT)
    parent.wait()
    assert gone(step)
    assert gone(child)
