"""The launcher: progress while it runs, a stop that leaves nobody behind, and a child that ends when its parent dies."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ft_assets.job import Job
from ft_assets.launchers import LocalLauncher, StepFailed
from ft_assets_tests.launching import interrupted, launched_elsewhere

STEP = """
import os, subprocess, sys, time
from pathlib import Path
from ft_assets.job import StepResult
from ft_assets.steps._run import main

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
    """Starts a step of the test instead of one of the package; all else is the real launcher."""

    def command(self, job_file: Path, job: Job) -> list[str]:
        return [sys.executable, str(job.inputs["script"]), str(job_file)]


def job(folder: Path, how: str) -> Job:
    script = folder / "step.py"
    script.write_text(STEP)
    return Job(
        step="test", asset="test", partition=None, fingerprint="0", settings={"how": how}, inputs={"script": script},
        output=folder / "output", checkpoints=folder / "checkpoints", work=folder / "work",
    )  # fmt: skip


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


def test_progress_and_result_arrive(tmp_path: Path) -> None:
    seen: list[dict] = []
    result = ScriptLauncher().run(job(tmp_path, "return"), lambda line: seen.append(dict(line)))
    assert result.metrics["answer"] == 42
    assert result.metrics["peak_memory_gb"] > 0
    assert [(line["message"], line["step"]) for line in seen] == [("begun", 1.0)]


def test_crash_is_told_with_its_exit_code_and_last_lines(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"exit code 7[\s\S]*the last words"):
        ScriptLauncher().run(job(tmp_path, "crash"), lambda _: None)


def test_interrupt_stops_the_step_and_its_children(tmp_path: Path) -> None:
    pids: list[int] = []
    with interrupted(lambda: pids.extend(wait_for(tmp_path / "work/pids"))):
        ScriptLauncher().run(job(tmp_path, "wait"), lambda _: None)
    assert all(gone(pid) for pid in pids)


def test_step_ends_when_its_launcher_is_killed(tmp_path: Path) -> None:
    the_job = job(tmp_path, "wait")
    parent = launched_elsewhere("ScriptLauncher()", __name__, the_job, tmp_path)
    step, child = wait_for(tmp_path / "work/pids")
    parent.kill()
    parent.wait()
    assert gone(step)
    os.kill(
        child, signal.SIGKILL
    )  # its own lifeline is the step's affair; a killed launcher can signal nobody
