"""Webserver and daemon of a project as two child processes that end together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from ft_assets.errors import ConfigError
from ft_assets.ui.guard import proxy_origin

POLL_SECONDS = 0.5
GRACE_SECONDS = 15.0


def origin_of(name: str) -> str:
    """Return the origin of the proxy that `--host-name` names. Raises ConfigError."""
    try:
        return proxy_origin(name)
    except ValueError:
        raise ConfigError(
            where=f"--host-name {name}",
            found="is not a host name",
            expected="the host of a proxy, e.g. graph.example.org, which means https",
            fix="name a proxy without TLS with its scheme: http://graph.example.org",
        ) from None


def require_free(port: int) -> None:
    """Raise ConfigError if another process listens on a port of this machine."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                where=f"--port {port}",
                found=f"cannot be listened on ({error.strerror})",
                expected="a free port of this machine",
                fix="end the process that has it (ss -ltnp shows it), or give another --port",
            ) from None


def serve(module: str, port: int, names: Sequence[str], read_only: bool) -> int:
    """Run the guarded webserver on 127.0.0.1 and, unless read-only, the daemon, until one ends.

    Raises ConfigError for a name that is not a host's. Returns the exit code: 0 after a stop,
    otherwise that of the process that ended.
    """
    environment = {
        **os.environ,
        "FT_UI_PORT": str(port),
        "FT_UI_PROXIES": ",".join(map(origin_of, names)),
    }
    web = [
        sys.executable,
        "-m",
        "ft_assets.ui.webserver",
        "-m",
        module,
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        *(["--read-only"] if read_only else []),
    ]
    daemon = [sys.executable, "-m", "dagster._daemon", "run", "-m", module]
    running = [
        subprocess.Popen(command, env=environment)
        for command in ([web] if read_only else [web, daemon])
    ]
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    while not stopped and all(process.poll() is None for process in running):
        time.sleep(POLL_SECONDS)
    ended = next((process.returncode for process in running if process.poll() is not None), 0)
    _stop(running)
    return 0 if stopped else ended or 1


def _stop(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
    for process in running:
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
