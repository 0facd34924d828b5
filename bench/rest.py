"""Measure what a project costs while nothing happens, and how long its commands take.

    python bench/rest.py PROJECT [--minutes 4]   # a folder with finetune.yaml and a finished graph

Starts `ft ui` on the project and prints: seconds to the address and to the first answer, CPU time
at rest for each process, memory (PSS: pages that processes share count once), then the CPU seconds
of `ft plan` for one base model and for each further copy of it, and of `ft run` with nothing to do.
It measures a copy beside the project, whose store is linked. Linux only: it reads /proc.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

FT = [sys.executable, "-m", "ft_assets.cli"]
SETTLE_SECONDS = 60  # the first plan of `mark_stale`
COPIES = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return used.user + used.system


def name_of(process: psutil.Process) -> str:
    line = process.cmdline()
    if "grpc" in line:
        return "code server"
    return "webserver and daemon" if "ft_assets.ui.webserver" in line else "ft ui"


def at_rest(folder: Path, minutes: float) -> None:
    """Print the start, the CPU time and the memory of `ft ui`."""
    begun = time.monotonic()
    ui = subprocess.Popen(
        [*FT, "ui", "--port", str(free_port())], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert ui.stdout is not None
    for label in ("address", "ready"):
        ui.stdout.readline()
        print(f"{label:<40} {time.monotonic() - begun:8.2f} s")
    time.sleep(SETTLE_SECONDS)
    root = psutil.Process(ui.pid)
    processes = [root, *root.children(recursive=True)]
    before, since = [cpu_seconds(one) for one in processes], time.monotonic()
    time.sleep(minutes * 60)
    passed, total = time.monotonic() - since, 0.0
    for process, used in zip(processes, before, strict=True):
        spent = cpu_seconds(process) - used
        total += spent
        pss = process.memory_full_info().pss / 1e6
        share = 100 * spent / passed
        print(f"{name_of(process):<40} {share:8.2f} % of a core {pss:6.0f} MB PSS")
    memory = sum(one.memory_full_info().pss for one in processes) / 1e6
    print(f"{'all':<40} {100 * total / passed:8.2f} % of a core {memory:6.0f} MB PSS")
    same = {one.pid for one in [root, *root.children(recursive=True)]}
    assert same == {one.pid for one in processes}, "a process was replaced"
    ui.send_signal(signal.SIGINT)
    ui.wait(60)


def command(folder: Path, *words: str) -> float:
    """Run a command and return its CPU seconds, with those of its children."""
    before = os.times()
    done = subprocess.run([*FT, *words], cwd=folder, capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        raise SystemExit(done.stderr)
    used = [after[index] - before[index] for index in (2, 3)]  # of children: user, system
    return sum(used)


def copied(project: Path, folder: Path) -> None:
    """Copy a project. The files of the store are links."""
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns("store"), dirs_exist_ok=True)
    store = Path(".ft") / "store"
    shutil.copytree(project / store, folder / store, copy_function=os.link)


def add_base_models(folder: Path, count: int) -> None:
    """Add copies of the first base model, all of whose steps are finished."""
    config = folder / "finetune.yaml"
    settings = yaml.safe_load(config.read_text())
    name, model = next(iter(settings["base_models"].items()))
    for copy in (f"{name}-{index}" for index in range(count)):
        settings["base_models"][copy] = model
        for made in (folder / ".ft" / "store").glob(f"*/{name}"):
            shutil.copytree(made, made.with_name(copy), copy_function=os.link)
            for path in made.with_name(copy).glob("*/manifest.json"):
                manifest = {**json.loads(path.read_text()), "partition": copy}
                path.unlink()  # a link
                path.write_text(json.dumps(manifest))
    config.write_text(yaml.safe_dump(settings))


def commands(folder: Path) -> None:
    """Print the CPU seconds of a run with nothing to do, and of plans."""
    command(folder, "run")
    print(f"{'ft run, nothing to do':<40} {command(folder, 'run'):8.2f} CPU s")
    one = min(command(folder, "plan") for _ in range(3))
    print(f"{'ft plan, one base model':<40} {one:8.2f} CPU s")
    add_base_models(folder, COPIES)
    more = min(command(folder, "plan") for _ in range(3))
    print(f"{'ft plan, each further':<40} {(more - one) / COPIES:8.2f} CPU s")


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("project", type=Path)
    arguments.add_argument("--minutes", type=float, default=4.0)
    given = arguments.parse_args()
    os.environ.pop("DAGSTER_HOME", None)
    project = given.project.resolve()
    with tempfile.TemporaryDirectory(dir=project.parent) as made:
        folder = Path(made)
        copied(project, folder)
        at_rest(folder, given.minutes)
        commands(folder)


if __name__ == "__main__":
    main()
