"""`ft ui`: the services of a project as a child process, which is watched.

The child is `ft_assets.ui.webserver`: webserver, pages and daemon. It has a child of its own, the
code server. This process loads no Dagster, so that it prints the address at once.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from types import FrameType

from ft_assets.errors import ConfigError
from ft_assets.ui.guard import proxy_origin

START_POLL_SECONDS, POLL_SECONDS = 0.25, 2.0
GRACE_SECONDS = 20.0
# The daemon looks this often, in seconds. Dagster's own 5 and 30 cost a tenth of the CPU time at
# rest. The first delays the retry of a dead run, the second the mark *Overdue*.
RESTING = {
    "DAGSTER_EVENT_LOG_CONSUMER_DAEMON_INTERVAL_SECONDS": "60",
    "FRESHNESS_DAEMON_INTERVAL_SECONDS": "300",
}


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


def serve(port: int, names: Sequence[str], read_only: bool) -> int:
    """Run the services on 127.0.0.1 until they end, and print the address and when it answers.

    Raises ConfigError for a name that is not a host's. Returns the exit code: 0 after a stop,
    otherwise that of the services.
    """
    environment = {
        **RESTING,
        **os.environ,
        "FT_UI_PORT": str(port),
        "FT_UI_PROXIES": ",".join(map(origin_of, names)),
    }
    command = [sys.executable, "-m", "ft_assets.ui.webserver"]
    begun = time.monotonic()
    process = subprocess.Popen([*command, *(["--read-only"] if read_only else [])], env=environment)
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    address = f"http://127.0.0.1:{port}"
    print(f"{address}/ft/ (Dagster: {address}/overview) starts; Ctrl-C ends it", flush=True)
    ready = False
    while (
        not stopped.wait(POLL_SECONDS if ready else START_POLL_SECONDS) and process.poll() is None
    ):
        # Not the first page, which would make a plan.
        if not ready and (ready := _answers(f"{address}/ft/static/style.css")):
            print(f"ready after {time.monotonic() - begun:.0f} s", flush=True)
    ended = process.poll()
    _stop(process)
    if ended is None or stopped.is_set():
        return 0
    how = (
        f"was killed by signal {-ended}; its code server ends within a minute"
        if ended < 0
        else f"ended with exit code {ended}, and nothing of it runs any more"
    )
    print(f"the UI {how}: start ft ui again", file=sys.stderr)
    return ended if ended > 0 else 1


def _answers(address: str) -> bool:
    """Return True if a page is served, whatever its content."""
    try:
        with urllib.request.urlopen(address, timeout=30):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
