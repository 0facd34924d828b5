"""The lease on checkpoints: one holder at a time, also if it is killed, stopped or woken up."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ft_assets.artifacts import ArtifactStore
from ft_assets.artifacts.lease import Lease
from ft_assets.errors import LeaseLost
from ft_assets_tests.launching import wait_until

NEVER = 600.0  # seconds of silence that no test waits for

# Holds a lease, and writes what `require` says whenever a line is asked for.
HOLDER = """
import sys
from pathlib import Path
from ft_assets.artifacts import ArtifactStore
from ft_assets.artifacts.lease import Lease
from ft_assets.errors import LeaseLost

store = ArtifactStore(Path(sys.argv[1]))
with Lease(store, "lora_adapter", "demo", "v1", "first-run", print, beat_seconds=0.05) as lease:
    lease.folder.mkdir(parents=True)
    (lease.folder / "checkpoint-50").write_text("first")
    print(lease.folder, flush=True)
    for line in sys.stdin:
        try:
            lease.require()
            print("held", flush=True)
        except LeaseLost as error:
            lease.folder.mkdir(exist_ok=True)
            (lease.folder / "checkpoint-60").write_text("late")
            print(error, flush=True)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "v1." in process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def asked(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline()


@pytest.fixture
def lease(tmp_path: Path) -> Callable[..., Lease]:
    def make(
        run: str = "second-run", silent_seconds: float = NEVER, say: Callable = lambda _: None
    ) -> Lease:
        return Lease(
            ArtifactStore(tmp_path), "lora_adapter", "demo", "v1", run, say, 0.05, silent_seconds
        )

    return make


def test_holder_is_named_and_waited_for(
    holder: subprocess.Popen[str], lease: Callable[..., Lease], tmp_path: Path
) -> None:
    told, got = list[str](), threading.Event()

    def wait() -> None:
        with lease(say=told.append) as second:
            assert (second.folder / "checkpoint-50").read_text() == "first"
            got.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: bool(told))
    (file,) = tmp_path.glob(".work/lora_adapter/demo/*.lease")
    os.utime(file, (0, 0))  # the times of another machine's clock decide nothing
    beat = file.read_text()
    wait_until(lambda: file.read_text() != beat)
    assert not got.is_set()
    assert asked(holder) == "held\n"
    assert f"lora_adapter[demo] is being made by run first-run (process {holder.pid} on " in told[0]
    assert "last sign of life" in told[0]
    holder.communicate()  # it ends, and gives the lease back
    waiting.join(30)
    assert got.is_set()
    assert [path.name for path in file.parent.iterdir()] == ["v1"]


def test_lease_of_a_killed_process_is_taken_over_at_once(
    holder: subprocess.Popen[str], lease: Callable[..., Lease]
) -> None:
    holder.kill()
    holder.wait()
    with lease() as second:
        assert (second.folder / "checkpoint-50").read_text() == "first"


def test_retry_of_the_same_run_takes_over_at_once(
    holder: subprocess.Popen[str], lease: Callable[..., Lease]
) -> None:
    with lease("first-run"):
        assert "was taken over by run first-run" in asked(holder)


def test_stopped_process_that_wakes_up_writes_and_publishes_nothing(
    holder: subprocess.Popen[str], lease: Callable[..., Lease]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    with lease(silent_seconds=0.5) as second:
        holder.send_signal(signal.SIGCONT)
        assert "gave no sign of life" in asked(holder)
        assert [path.name for path in second.folder.iterdir()] == ["checkpoint-50"]
        holder.communicate()
        second.require()  # the first one's end took nothing away
        third = lease("third-run", say=(told := list[str]()).append)
        threading.Thread(target=third.__enter__, daemon=True).start()
        wait_until(lambda: bool(told))
        assert "is being made by run second-run" in told[0]
    wait_until(lambda: third.folder.exists())
    assert (third.folder / "checkpoint-50").read_text() == "first"
    third.require()
    with pytest.raises(LeaseLost):
        second.require()
    third.__exit__()


def test_lease_file_of_random_bytes_is_taken_over_after_the_silence(
    lease: Callable[..., Lease], tmp_path: Path
) -> None:
    file = tmp_path / ".work/lora_adapter/demo/v1.lease"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff\x00")
    began, told = time.monotonic(), list[str]()
    with lease(silent_seconds=0.5, say=told.append) as taken:
        taken.require()
    assert time.monotonic() - began >= 0.5
    assert "another run, whose lease cannot be read" in told[0]
