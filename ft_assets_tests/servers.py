"""Fork servers of this test process: one for `ft`, one for the steps of every `ft` that it runs.

Each saves its processes the imports that would be most of their time. What it starts is a real
process with an environment, an exit code and output of its own (test_fork_server.py compares it
with a fresh one). FT_FRESH_STEPS=1 runs all tests on fresh processes.
"""

import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ft_assets.launchers.fork_server import differences
from ft_assets.launchers.forking import ForkServer, start_forked
from ft_assets.launchers.local import step_environment

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # conftest.py imports this module before any test runs
ENVIRONMENT = dict(os.environ)
STEP_ENVIRONMENT = step_environment()
NO_SERVER = "@no-server"  # steps are then fresh processes
FRESH = os.environ.get("FT_FRESH_STEPS") == "1" or sys.platform != "linux"
SET_BY_IMPORTS = ("KMP_", "TORCHINDUCTOR_")  # sklearn and torch.compile set these in a test process


@functools.cache
def step_server() -> ForkServer:
    """Return the server for steps. All `ft` of this process share it through FT_STEP_SERVER."""
    return ForkServer(["ft_assets.steps.preload"], STEP_ENVIRONMENT)


@functools.cache
def ft_server() -> ForkServer:
    """Return the server for `ft`, which has imported Dagster and the commands."""
    return ForkServer(["ft_assets_tests.preload"], ENVIRONMENT)


def set_by_imports() -> list[str]:
    """Return the variables that libraries have set in this process and that a shell has not."""
    return [
        name for name in os.environ if name.startswith(SET_BY_IMPORTS) and name not in ENVIRONMENT
    ]


def shell_environment() -> dict[str, str]:
    """Return the environment of this process as a shell has it."""
    hidden = set_by_imports()
    return {name: value for name, value in os.environ.items() if name not in hidden}


def steps_fork(environment: Mapping[str, str]) -> bool:
    """Return True if the shared step server forks for this environment.

    Else an `ft run` starts a server of its own, as it does for a user.
    """
    return not FRESH and not differences(ENVIRONMENT, environment, ENVIRONMENT)


def run_module(
    server: Callable[[], ForkServer],
    module: str,
    *arguments: str,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 380,
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m module` to its end as `subprocess.run` does, forked where that is equal."""
    command = [sys.executable, "-m", module, *arguments]
    environment = shell_environment() if environment is None else environment
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as error,
        Path(os.devnull).open("rb") as nothing,
    ):
        streams = (nothing.fileno(), out.fileno(), error.fileno())
        started = None
        if not FRESH:
            started = start_forked(
                server().address, module, arguments, environment, streams, cwd=cwd
            )
        if started is None:
            started = subprocess.Popen(
                command, cwd=cwd, env=environment, stdin=nothing, stdout=out, stderr=error
            )
        try:
            code = started.wait(timeout)
        except BaseException:
            os.kill(started.pid, signal.SIGKILL)
            raise
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(command, code, *texts)
