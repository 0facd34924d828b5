"""A forked process equals a fresh one, and where it could differ it is fresh."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ft_assets.errors import StepLost
from ft_assets.launchers import LocalLauncher
from ft_assets.launchers.fork_server import refusal
from ft_assets.launchers.forking import ForkedProcess, ForkServer, start_forked
from ft_assets.launchers.local import start_forked_or_fresh, step_environment
from ft_assets_tests import servers
from ft_assets_tests.launching import process_groups, training_job, wait_until
from ft_assets_tests.test_launcher_local import ModuleLauncher, job, parent_command, wait_for

TELL = """
import atexit, json, os, random, signal, sys
import numpy
out = sys.argv[1]
atexit.register(lambda: open(out + ".exit", "w").write("handler"))
print("from Python", flush=True)
os.write(2, b"from the descriptor")
told = {
    "argv": sys.argv, "file": __file__, "name": __name__,
    "main": sys.modules["__main__"] is sys.modules[__name__], "path": sys.path,
    "cwd": os.getcwd(), "environment": dict(os.environ), "stdin": sys.stdin.read(),
    "leads": os.getpid() == os.getsid(0) == os.getpgrp(),
    "int": str(signal.getsignal(signal.SIGINT)),
    "term": str(signal.getsignal(signal.SIGTERM)), "chld": str(signal.getsignal(signal.SIGCHLD)),
    "wakeup": signal.set_wakeup_fd(-1),
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "command": open("/proc/self/cmdline").read().rstrip("\\0").split("\\0"),
    "flags": str(sys.flags), "buffered": [sys.stdout.line_buffering, sys.stdout.write_through],
    "lifeline": os.readlink("/proc/self/fd/" + os.environ.pop("FT_LIFELINE_FD")),
    "descriptors": len(os.listdir("/proc/self/fd")),
}
told["environment"].pop("FT_LIFELINE_FD")
json.dump(told, open(out, "w"))
json.dump([random.random(), numpy.random.random()], open(out + ".random", "w"))
exec(sys.argv[2])
"""


@pytest.fixture(scope="module")
def usual_signals() -> Iterator[None]:
    """Children inherit what this process ignores, and earlier tests can change that."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, usual)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@pytest.fixture(scope="module")
def server(usual_signals: None) -> Iterator[ForkServer]:
    running = ForkServer(["numpy"], servers.STEP_ENVIRONMENT)
    yield running
    running.close()


@pytest.fixture
def folder(tmp_path: Path, server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module `tell`, which is the working directory; processes are forked."""
    monkeypatch.delenv("FT_FRESH_STEPS", raising=False)
    monkeypatch.setenv("FT_STEP_SERVER", server.address)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tell.py").write_text(TELL)
    return tmp_path


def tell(folder: Path, name: str, end: str = "") -> tuple[int, Any, bool]:
    """Run `tell`; return its exit code, what it told, and whether it was forked."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "tell", str(folder / name), end]
    with (folder / f"{name}.log").open("wb") as log:
        process = start_forked_or_fresh(command, step_environment(read_end), read_end, log.fileno())
        code = process.wait(60)
    told = json.loads((folder / name).read_text())
    assert told.pop("lifeline") == str(Path(f"/proc/self/fd/{read_end}").readlink())
    os.close(read_end)
    os.close(write_end)
    return code, told, isinstance(process, ForkedProcess)


def test_forked_process_has_all_that_a_fresh_one_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_OF_THE_STEP", "a value")
    code, forked, is_forked = tell(folder, "told")
    log = (folder / "told.log").read_bytes()
    random = json.loads((folder / "told.random").read_text())
    handler = (folder / "told.exit").read_text()
    assert (code, is_forked) == (0, True)
    monkeypatch.setenv("FT_FRESH_STEPS", "1")
    fresh_code, fresh, is_forked = tell(folder, "told")
    assert (fresh_code, is_forked) == (0, False)
    assert fresh["environment"].pop("FT_FRESH_STEPS") == "1"
    assert forked == fresh
    assert log == (folder / "told.log").read_bytes() == b"from Python\nfrom the descriptor"
    assert handler == (folder / "told.exit").read_text() == "handler"
    assert not set(random) & set(json.loads((folder / "told.random").read_text()))


def test_two_forked_processes_draw_different_random_numbers(folder: Path) -> None:
    for name in ("one", "two"):
        assert tell(folder, name)[2]
    one, two = (json.loads((folder / f"{name}.random").read_text()) for name in ("one", "two"))
    assert not set(one) & set(two)


@pytest.mark.parametrize(
    ("end", "code", "log"),
    [
        ("sys.exit(7)", 7, b""),
        ("sys.exit('a sentence')", 1, b"a sentence\n"),
        ("raise ValueError('a reason')", 1, b"ValueError: a reason\n"),
        ("os.kill(os.getpid(), 9)", -9, b""),
        ("os.kill(os.getpid(), 15)", -15, b""),
        ("os.kill(os.getpid(), 2)", -2, b"KeyboardInterrupt\n"),
        ("import ctypes; ctypes.string_at(0)", -11, b""),
        (
            "open('kept', 'w').write('text'); kept = [open('kept', 'a')]; kept[0].write('end')",
            0,
            b"",
        ),
    ],
)
def test_forked_process_ends_as_a_fresh_one(
    folder: Path, end: str, code: int, log: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tell(folder, "forked", end)[::2] == (code, True)
    assert (folder / "forked.log").read_bytes().endswith(log)
    monkeypatch.setenv("FT_FRESH_STEPS", "1")
    assert tell(folder, "fresh", end)[::2] == (code, False)
    assert (folder / "fresh.log").read_bytes().endswith(log)


def test_process_that_needs_another_environment_at_import_is_fresh(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    code, told, is_forked = tell(folder, "told")
    assert (code, is_forked, told["environment"]["OMP_NUM_THREADS"]) == (0, False, "3")


def test_process_is_fresh_where_the_server_has_a_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "threaded.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    environment = step_environment()
    for module, is_forked in (("numpy", True), ("threaded", False)):
        server = ForkServer([module], environment)
        monkeypatch.setenv("FT_STEP_SERVER", server.address)
        assert tell(folder, module)[::2] == (0, is_forked)
        server.close()


def test_process_is_fresh_where_the_server_cannot_import(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ForkServer(["there_is_no_such_module"], step_environment())
    monkeypatch.setenv("FT_STEP_SERVER", server.address)
    assert tell(folder, "told")[::2] == (0, False)
    server.close()


@pytest.mark.parametrize(
    ("at_start", "now", "why"),
    [
        ({}, {"HF_HOME": "/x"}, "HF_HOME"),
        ({"TOKENIZERS_PARALLELISM": "true"}, {}, "TOKENIZERS_PARALLELISM"),
        ({"A": "1", "B": "2"}, {"A": "2", "B": "3"}, "A, B"),
        ({}, {"SET_BY_AN_IMPORT": "2"}, "SET_BY_AN_IMPORT"),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, "GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, {"CUDA_VISIBLE_DEVICES": "0"}, "GPUs"),
    ],
)
def test_server_refuses_what_could_differ(at_start: dict, now: dict, why: str) -> None:
    after = {**at_start, "SET_BY_AN_IMPORT": "1"}
    assert why in (refusal(at_start, now, after) or "")


def test_server_forks_what_only_a_running_process_reads() -> None:
    """Run in a process of its own: this one may have threads."""
    code = """
from ft_assets.launchers.fork_server import refusal
now = {"PWD": "/b", "FT_CONFIG": "x", "CUDA_VISIBLE_DEVICES": "1", "SET_BY_AN_IMPORT": "1"}
assert refusal({"PWD": "/a"}, now, {"PWD": "/a", "SET_BY_AN_IMPORT": "1"}) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_server_ends_with_its_owner_also_when_that_is_killed(folder: Path) -> None:
    code = """
import time
from ft_assets.launchers.forking import ForkServer
from ft_assets.launchers.local import step_environment
server = ForkServer(["json"], step_environment())
print(server._process.pid, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    server = int(owner.stdout.readline())
    assert Path(f"/proc/{server}/exe").exists()
    owner.kill()
    owner.communicate()
    wait_until(lambda: state(server) in "ZX", 30)


def state(pid: int) -> str:
    """Return the state of a process as proc(5) names it; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def test_step_whose_server_is_killed_ends_and_counts_as_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ForkServer(["json"], step_environment())
    monkeypatch.setenv("FT_STEP_SERVER", server.address)
    pids: list[int] = []

    def kill_server(line: Any) -> None:
        pids.extend(wait_for(folder / "work/pids"))
        os.kill(server._process.pid, signal.SIGKILL)

    with pytest.raises(StepLost, match="signal 9"):
        ModuleLauncher().run(job(folder, "wait"), kill_server)
    wait_until(lambda: all(state(pid) in "ZX" for pid in pids), 30)


def test_sft_of_a_forked_step_has_the_bits_of_a_fresh_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FT_STEP_SERVER", raising=False)
    adapters, curves, parents = [], [], []
    for fresh in ("0", "1"):
        monkeypatch.setenv("FT_FRESH_STEPS", fresh)
        sft = training_job(finished, tmp_path / fresh)
        seen: list[bytes] = []

        def look(line: Any, work: Path = sft.work, seen: list[bytes] = seen) -> None:
            seen.extend(parent_command(pid) for pid in process_groups(work))

        LocalLauncher().run(sft, look)
        parents.append(seen[0])
        adapters.append((sft.output / "adapter_model.safetensors").read_bytes())
        curve = json.loads((sft.output / "info/curve.json").read_text())
        curves.append([(entry["step"], entry["loss"], entry["grad_norm"]) for entry in curve])
    assert [b"launchers.fork_server" in parent for parent in parents] == [True, False]
    assert adapters[0] == adapters[1]
    assert curves[0] == curves[1]


@pytest.mark.graph
@pytest.mark.parametrize("name", ["ft_server", "step_server"])
def test_servers_of_these_tests_fork(name: str, tmp_path: Path) -> None:
    """Where a server refused, every test would quietly use fresh processes, twice as slow.

    Some libraries set variables when they are imported, in this process too.
    """
    import torch._inductor.runtime.cache_dir_utils

    torch._inductor.runtime.cache_dir_utils.cache_dir()
    assert "TORCHINDUCTOR_CACHE_DIR" in os.environ
    server = getattr(servers, name)()
    environment = step_environment() if name == "step_server" else servers.shell_environment()
    with (tmp_path / "log").open("wb") as log, Path(os.devnull).open("rb") as nothing:
        streams = (nothing.fileno(), log.fileno(), log.fileno())
        started = start_forked(server.address, "timeit", ["-n1", "pass"], environment, streams)
    assert started is not None
    assert started.wait(60) == 0
