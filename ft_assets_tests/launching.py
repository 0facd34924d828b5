"""Jobs for the tests of launchers, and comparisons of what two runs of a job produce."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import load_project
from ft_assets.job import Job
from ft_assets.launchers import Launcher


def training_job(finished: Path, folder: Path, step: str = "sft", **changes: Any) -> Job:
    """Return an SFT or DPO job of the finished project with micro-batches of 4, in `folder`."""
    store = ArtifactStore(finished / ".ft/store")
    recipe = load_project(finished / "finetune.yaml").recipe("tiny")
    settings = {
        **getattr(recipe, step).model_dump(mode="json"),
        "micro_batch": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        **changes,
    }
    made = ("base_model", "heldout_split", *(["lora_adapter"] if step == "dpo" else []))
    (folder / "output").mkdir(parents=True)
    return Job(
        step=step,
        gpu=True,
        distributed=True,
        asset="test",
        partition="tiny",
        fingerprint="0",
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        work=folder / "work",
        settings={"lora": recipe.lora.model_dump(mode="json"), step: settings},
        inputs={name: store.need(name, "tiny").path for name in made},
    )


def trained(
    launcher: Launcher, job: Job
) -> tuple[list[dict[str, Any]], list[dict[str, float]], Mapping[str, Any]]:
    """Run a job; return the progress lines, the loss curve and the metrics."""
    lines: list[dict[str, Any]] = []
    result = launcher.run(job, lambda line: lines.append(dict(line)))
    return lines, json.loads((job.output / "info/curve.json").read_text()), result.metrics


def require_same_training(job: Job, other: Job) -> None:
    """Compare the trainings of one process and of several on the same rows.

    Compares losses and gradient norms step by step, then the adapters. The last step of an epoch
    may differ: where its rows do not fill all ranks, Accelerate repeats some.
    """
    from safetensors.numpy import load_file

    one, several = (
        json.loads((made.output / "info/curve.json").read_text()) for made in (job, other)
    )
    assert [entry["step"] for entry in one] == [entry["step"] for entry in several]
    for name, within in (("loss", 2e-3), ("grad_norm", 1e-2)):
        assert [entry[name] for entry in one[:-1]] == pytest.approx(
            [entry[name] for entry in several[:-1]], rel=within
        )
    assert one[-1]["loss"] == pytest.approx(several[-1]["loss"], rel=1e-2)
    first, second = (load_file(made.output / "adapter_model.safetensors") for made in (job, other))
    assert first.keys() == second.keys()
    # As a whole, not number by number: Adam's first step is the sign of the gradient, and a
    # gradient near zero can have either sign.
    names = [name for name in first if "lora_B" in name]
    apart = sum(float(((first[name] - second[name]) ** 2).sum()) for name in names) ** 0.5
    moved = sum(float((first[name] ** 2).sum()) for name in names) ** 0.5
    assert apart < 0.2 * moved


def training(job: Job) -> bool:
    """Return True if a job has reported an optimizer step."""
    return job.progress_file.exists() and '"train"' in job.progress_file.read_text()


@contextlib.contextmanager
def interrupted(when: Callable[[], object], again: bool = False) -> Iterator[None]:
    """Send SIGINT to this process as soon as `when` returns. The block must end by it.

    With `again`, send a second one while the launcher stops its processes.
    """
    # Where the tests run in the background of a script, SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        when()
        os.kill(os.getpid(), signal.SIGINT)
        if again:
            wait_until(lambda: signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    thread.join()


def launched_elsewhere(
    launcher: str, module: str, job: Job, folder: Path
) -> "subprocess.Popen[bytes]":
    """Run a job in another process, which the test can kill.

    `launcher` is an expression for a launcher. It uses names of the test module `module`.
    """
    (folder / "given.json").write_text(job.model_dump_json())
    code = f"""
from pathlib import Path
from ft_assets.job import Job
from {module} import *
job = Job.model_validate_json(Path({str(folder / "given.json")!r}).read_text())
{launcher}.run(job, lambda _: None)
"""
    # Without `env` it would inherit what libraries have set in C, which os.environ does not show.
    return subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))


def stop_services(*services: "subprocess.Popen[bytes]") -> None:
    """Interrupt Dagster's webserver and daemon, and kill those that run after 30 seconds."""
    for process in services:
        process.send_signal(signal.SIGINT)
    for process in services:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def process_groups(work: Path) -> set[int]:
    """Return the processes of this machine whose command line names the job."""
    named, found = os.fsencode(str(work / "job.json")), set[int]()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if named in file.read_bytes():
                found.add(int(file.parent.name))
        except OSError:
            continue
    return found - {os.getpid()}


def wait_until(condition: Any, seconds: float = 90) -> None:
    """Wait for a condition that another process brings about."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.1)
