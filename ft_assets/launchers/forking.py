"""Start processes through a fork server (see fork_server.py), which saves them their imports.

Linux only. Every function returns None where a forked process is not possible or could differ
from a fresh one; the caller then starts a fresh one.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

PADDING = "-" * 8192  # room for the command line of a child: two paths of the greatest length
ANSWER_SECONDS = 300.0  # the first answer comes after the server's imports


class ForkedProcess:
    """A process that a fork server started, with the part of `subprocess.Popen` that we use."""

    def __init__(self, client: socket.socket, pid: int, rest: bytes, command: list[str]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._client = client
        self._received = rest
        self._command = command

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        self._receive(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._receive(left) and left == 0:
                raise subprocess.TimeoutExpired(self._command, timeout or 0)
        return self.returncode

    def _receive(self, timeout: float | None) -> bool:
        """Receive a part of the answer. Return False if nothing came in time."""
        if self.returncode is not None:
            return True
        if not select.select([self._client], [], [], timeout)[0]:
            return False
        data = self._client.recv(4096)
        self._received += data
        if self._received.endswith(b"\n"):
            self.returncode = int(json.loads(self._received)["code"])
        elif not data:  # the server was killed, and only it could reap the process
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.returncode = -signal.SIGKILL
        if self.returncode is not None:
            self._client.close()
        return True


class ForkServer:
    """A fork server that ends with this process. `modules` are imported in the background."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.address = f"@ft-{uuid.uuid4().hex}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(_abstract(self.address))
            listener.listen()
            command = [sys.executable, "-m", "ft_assets.launchers.fork_server"]
            self._process = subprocess.Popen(
                [*command, str(listener.fileno()), *modules, PADDING],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=(listener.fileno(),),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the server. Processes that it has started go on."""
        self._process.communicate()


def start_forked(
    address: str,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    streams: tuple[int, int, int],
    *,
    lifeline: int | None = None,
    kept: Sequence[int] = (),
    cwd: Path | None = None,
) -> ForkedProcess | None:
    """Start `python -m module arguments` by a fork, or return None if the server refuses.

    `streams` are the descriptors for stdin, stdout and stderr. The process leads a session.
    """
    inherited = [*streams, *([] if lifeline is None else [lifeline]), *kept]
    request = {
        "module": module,
        "arguments": list(arguments),
        "environment": dict(environment),
        "cwd": str(cwd or Path.cwd()),
        "lifeline": None if lifeline is None else len(streams),
    }
    client = socket.socket(socket.AF_UNIX)
    try:
        client.settimeout(ANSWER_SECONDS)
        client.connect(_abstract(address))
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(client, [data], inherited)
        client.sendall(data[sent:])
        answer, rest = _first_line(client)
    except OSError:
        client.close()
        return None
    except BaseException:
        client.close()
        raise
    if "pid" not in answer:
        client.close()
        return None
    client.settimeout(None)
    command = [sys.executable, "-m", module, *arguments]
    return ForkedProcess(client, int(answer["pid"]), rest, command)


def _first_line(client: socket.socket) -> tuple[dict[str, int | str], bytes]:
    data = b""
    while b"\n" not in data:
        if not (more := client.recv(4096)):
            raise ConnectionError("the fork server ended")
        data += more
    line, _, rest = data.partition(b"\n")
    return json.loads(line), rest


def _abstract(address: str) -> str:
    """Return the name of a socket that is not in the file system: nothing is left to delete."""
    return "\0" + address.removeprefix("@")
