"""Run a step as processes of this machine: one, or a group of ranks that start and end together.

A step of one process is forked from a server that has imported its libraries (fork_server.py).
Ranks are fresh processes.

The stock Pipes client is not used, because its messages arrive only at the end. `accelerate
launch` and torchrun are not used, because they start each rank in a session of its own without
our lifeline: a killed launcher would leave them training. Here each rank holds the lifeline
itself, and the first rank that fails ends the others.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ft_assets.config.launcher import LocalSettings
from ft_assets.job import Job, StepResult
from ft_assets.launchers.base import OnProgress, ProgressReader, outcome, prepare
from ft_assets.launchers.devices import held_gpu
from ft_assets.launchers.forking import ForkServer, start_forked

POLL_SECONDS = 0.2
GRACE_SECONDS = (20.0, 5.0)  # after INT (time for a checkpoint), after TERM
# After the first rank has failed: another rank may be about to write the cause.
LAST_WORDS_SECONDS = 5.0

_server: ForkServer | None = None  # of this process; its steps are forked from it


class StepProcess(Protocol):
    """A started process that leads a group: a child of ours, or one of our fork server."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class LocalLauncher:
    """Run a step as `python -m ft_assets.steps.<step> job.json` and stream its progress."""

    def __init__(self, settings: LocalSettings | None = None, root: Path = Path()) -> None:
        """Take the arguments that every launcher takes. A local step needs neither."""

    def warm_up(self) -> None:
        """Import the steps' libraries in the background: a step will probably follow."""
        warm_up()

    def command(self, job_file: Path, job: Job) -> list[str]:
        return [sys.executable, "-m", f"ft_assets.steps.{job.step}", str(job_file)]

    def ranks(self, job: Job) -> list[dict[str, str]]:
        """Return the additional environment of each process. There is one process a rank."""
        return [{}]

    def run(self, job: Job, on_progress: OnProgress) -> StepResult:
        """Run the job to its end. An interrupt stops all its processes.

        Raises the step's own FtError, StepFailed or StepLost.
        """
        job_file = prepare(job)
        # The lifeline: a child ends when our end closes, also when this process is killed.
        read_end, write_end = os.pipe()
        environment = step_environment(read_end)
        processes: list[StepProcess] = []
        ranks = self.ranks(job)
        alone = len(ranks) == 1 and job.gpu
        start_one = start_forked_or_fresh if len(ranks) == 1 else start
        command = self.command(job_file, job)
        with held_gpu() if alone else contextlib.nullcontext(({}, [])) as (gpu, kept):
            try:
                with job.log_file.open("wb") as log:
                    for rank in ranks:
                        own = {**environment, **rank, **gpu}
                        processes.append(start_one(command, own, read_end, log.fileno(), kept))
                os.close(read_end)
                code = follow(processes, ProgressReader(job, on_progress))
            finally:
                stop(processes)
                os.close(write_end)
        return outcome(job, code)


def warm_up() -> None:
    """Start the server that steps are forked from. It imports their libraries in the background.

    FT_FRESH_STEPS=1 turns it off. FT_STEP_SERVER is the address of a server that several
    commands share.
    """
    global _server
    if sys.platform != "linux" or os.environ.get("FT_FRESH_STEPS") == "1":
        return
    if "FT_STEP_SERVER" in os.environ or (_server is not None and _server.alive):
        return
    _server = ForkServer(["ft_assets.steps.preload"], step_environment())


def start_forked_or_fresh(
    command: Sequence[str],
    environment: Mapping[str, str],
    lifeline: int,
    log: int,
    kept: Sequence[int] = (),
) -> StepProcess:
    """Start a process as `start` does, forked where the result is equal to a fresh process."""
    if [sys.executable, "-m"] == list(command[:2]) and (address := _server_address()):
        with Path(os.devnull).open("rb") as nothing:
            forked = start_forked(
                address,
                command[2],
                command[3:],
                environment,
                (nothing.fileno(), log, log),
                lifeline=lifeline,
                kept=kept,
            )
        if forked is not None:
            return forked
    return start(command, environment, lifeline, log, kept)


def _server_address() -> str | None:
    if os.environ.get("FT_FRESH_STEPS") == "1":
        return None
    warm_up()
    return os.environ.get("FT_STEP_SERVER") or (_server.address if _server is not None else None)


def step_environment(lifeline: int | None = None) -> dict[str, str]:
    """Return the environment of a step's process: ours, and the descriptor of the lifeline."""
    return {
        **os.environ,
        **({} if lifeline is None else {"FT_LIFELINE_FD": str(lifeline)}),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    lifeline: int,
    log: int | None,
    kept: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process that leads a group and inherits the lifeline and the descriptors `kept`.

    Its output goes to `log`, or with None to the output of this process.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=None if log is None else subprocess.STDOUT,
        env=environment,
        pass_fds=(lifeline, *kept),
        start_new_session=True,
    )


def follow(processes: Sequence[StepProcess], meanwhile: Callable[[], None]) -> int:
    """Call `meanwhile` until all processes have ended or one has failed.

    Returns 0, or the most telling code: a signal (negative) takes precedence over an exit code.
    """
    failed_at: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        meanwhile()
        if all(code is not None for code in codes) or (
            failed_at and time.monotonic() - failed_at > LAST_WORDS_SECONDS
        ):
            break
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
        time.sleep(POLL_SECONDS)
    return min((code for code in codes if code), default=0)


def stop(processes: Sequence[StepProcess]) -> None:
    """Stop processes and the groups that they lead: INT (writes a checkpoint), TERM, KILL.

    INT is ignored meanwhile. A second one (from an impatient user or systemd) would end this
    process, and with it the step before its checkpoint.
    """
    with _no_interrupt():
        _stop(processes)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only it receives signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(processes: Sequence[StepProcess]) -> None:
    for signum, grace in zip((signal.SIGINT, signal.SIGTERM), GRACE_SECONDS, strict=True):
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            _signal(process, signum)
        deadline = time.monotonic() + grace
        for process in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.poll() is None or process.returncode:  # a failed step may leave children
            _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: StepProcess, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)


def free_port() -> int:
    """Return a TCP port of the loopback interface on which no process listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
