"""A step of one process sees one GPU, and two concurrent steps see different ones.

This machine needs no GPU: CUDA_VISIBLE_DEVICES names some.
"""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from ft_assets.config.launcher import AccelerateSettings
from ft_assets.hardware import visible_gpus
from ft_assets.job import Job
from ft_assets.launchers import LocalLauncher
from ft_assets.launchers.accelerate import AccelerateLauncher
from ft_assets.launchers.devices import held_gpu
from ft_assets_tests.launching import wait_until

TELL = """
import json, os, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
Path(job["work"], "begun").touch()
while not Path(job["work"], "go").exists(): time.sleep(0.05)
result = {"metrics": {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}, "parts": {}}
Path(job["work"], "result.json").write_text(json.dumps(result))
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")


class Telling(LocalLauncher):
    """Start a process that reports the GPUs that it sees, and waits for a file before it ends."""

    def command(self, job_file: Path, job: Job) -> list[str]:
        return [sys.executable, "-c", TELL, str(job_file)]


class TellingRanks(Telling, AccelerateLauncher):
    """The same with a rank for each GPU."""


def job(folder: Path, step: str) -> Job:
    return Job(
        step=step,
        gpu=step == "sft",
        distributed=step == "sft",
        asset="test",
        partition=None,
        fingerprint="0",
        settings={},
        inputs={},
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        work=folder / "work",
    )


def test_steps_side_by_side_take_a_gpu_each_and_the_third_shares(tmp_path: Path) -> None:
    seen: dict[int, str] = {}

    def run(number: int) -> None:
        seen[number] = (
            Telling().run(job(tmp_path / str(number), "sft"), lambda _: None).metrics["gpu"]
        )

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until((tmp_path / str(number) / "work/begun").exists)
    for number in range(3):
        (tmp_path / str(number) / "work/go").touch()
    for thread in threads:
        thread.join()
    assert seen == {0: "4", 1: "7", 2: "4"}


def test_ranks_see_all_and_a_light_step_what_we_see(tmp_path: Path) -> None:
    for name, launcher, step in (
        ("ranks", TellingRanks(AccelerateSettings(kind="accelerate")), "sft"),
        ("light", Telling(), "split"),
    ):
        (tmp_path / name / "work").mkdir(parents=True)
        (tmp_path / name / "work/go").touch()
        assert launcher.run(job(tmp_path / name, step), lambda _: None).metrics["gpu"] == "4,7"


def test_gpu_is_held_to_the_end_of_the_process_not_of_its_launcher() -> None:
    with held_gpu() as (environment, kept):
        assert environment == {"CUDA_VISIBLE_DEVICES": "4", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=kept
        )
    with held_gpu() as (environment, _):
        assert environment["CUDA_VISIBLE_DEVICES"] == "7"
    child.communicate(b"\n")
    with held_gpu() as (environment, _):
        assert environment["CUDA_VISIBLE_DEVICES"] == "4"


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("", []),
        ("-1", []),
        ("0", ["0"]),
        ("1, 0,-1,2", ["1", "0"]),
        ("GPU-8f,MIG-2", ["GPU-8f", "MIG-2"]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(
    monkeypatch: pytest.MonkeyPatch, visible: str, gpus: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == gpus
    with held_gpu() as (environment, kept):
        assert (environment == {}, kept == []) == (
            (True, True) if len(gpus) < 2 else (False, False)
        )
