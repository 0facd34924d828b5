"""A server that forks processes whose libraries are imported already.

    python -m ft_assets.launchers.fork_server SOCKET_FD PRELOADED_MODULE... PADDING

Importing torch, transformers, peft and trl takes longer than the work of a small step. This
process imports them once and forks a child for each request. The clients are in forking.py.

A child is equal to a fresh `python -m module arguments`: it gets the environment, the working
directory, the descriptors and the command line of the request, leads a session of its own, runs
the module as `__main__`, runs its exit handlers and ends with its exit code. Where equality is
not certain, the server refuses and the client starts a fresh process (see `refusal`).

Why not `multiprocessing.forkserver`: its children import the main module of the process that
requests them (`ft`, and with it Dagster), only the process that started it can reach it, and no
code of ours runs between the request and the fork. Its way to pass descriptors is public
(`socket.send_fds`), and this server uses that.

Protocol, one connection a process: the client sends one JSON line with the descriptors
[stdin, stdout, stderr, others...]. The answer is `{"refused": why}`, or `{"pid": n}` followed by
`{"code": n}` when the process has ended. A negative code is the signal that killed it.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypedDict

MAX_DESCRIPTORS = 16
RECEIVE_SECONDS = 10.0  # a client sends its request in one go

# Set while the libraries are imported, and not in the children. A CUDA context does not survive a
# fork, and torch's default test for a GPU makes one. Arrow's jemalloc starts a thread.
WHILE_IMPORTING = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
# Variables that no library reads while it is imported. CUDA reads its own when it is initialized,
# which is after the fork; `_hides_gpus` compares what the libraries derive from them.
READ_LATE = ("FT_", "DAGSTER_", "PYTEST_", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
READ_LATE_BY_NAME = frozenset({"_", "PWD", "OLDPWD", "SHLVL"})


class Request(TypedDict):
    """A process to start. `lifeline` is the index of the descriptor that FT_LIFELINE_FD names."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    cwd: str
    lifeline: int | None


@dataclass(frozen=True)
class Child:
    """What a forked child needs to become the requested process."""

    request: Request
    descriptors: list[int]


class Server:
    """Forks a child for each request until stdin closes, whose other end the owner holds."""

    def __init__(self, listener: socket.socket, at_start: Mapping[str, str]) -> None:
        self._listener = listener
        self._at_start = at_start
        self._running: dict[int, socket.socket] = {}
        self._wakeup = os.pipe()
        for end in self._wakeup:
            os.set_blocking(end, False)
        self._handlers = {
            signal.SIGCHLD: signal.signal(signal.SIGCHLD, lambda *_: None),
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        }
        signal.set_wakeup_fd(self._wakeup[1])
        self._selector = selectors.DefaultSelector()
        for descriptor in (0, self._wakeup[0], listener.fileno()):
            self._selector.register(descriptor, selectors.EVENT_READ)

    def serve(self) -> Child:
        """Serve requests. Returns in a child only; the server itself ends by SystemExit."""
        while True:
            ready = {key.fd for key, _ in self._selector.select()}
            if 0 in ready:
                sys.exit(0)
            if self._wakeup[0] in ready:
                os.read(self._wakeup[0], 65536)
                self._reap()
            if self._listener.fileno() in ready and (child := self._accept()) is not None:
                return child

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            client = self._running.pop(pid)
            _answer(client, code=os.waitstatus_to_exitcode(status))
            client.close()

    def _accept(self) -> Child | None:
        client, _ = self._listener.accept()
        with contextlib.ExitStack() as received:
            try:
                if not _is_same_user(client):
                    raise PermissionError("the client is a process of another user")
                child = _receive(client, received)
                if why := refusal(self._at_start, child.request["environment"], os.environ):
                    raise ValueError(why)
                pid = os.fork()
            except (OSError, ValueError) as error:
                _answer(client, refused=str(error))
                client.close()
                return None
            if pid:
                self._running[pid] = client
                return None
            received.pop_all()
        self._leave()
        # Before the client gets the pid: it signals the group, and others read the command line.
        os.setsid()
        try:
            set_command_line(command_of(child.request))
        except OSError as error:
            _answer(client, refused=str(error))
            os._exit(1)
        _answer(client, pid=os.getpid())
        client.close()
        return child

    def _leave(self) -> None:
        """In the child, drop what belongs to the server."""
        signal.set_wakeup_fd(-1)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._selector.close()
        self._listener.close()
        for other in self._running.values():
            other.close()
        for end in self._wakeup:
            os.close(end)


def differences(
    at_start: Mapping[str, str], environment: Mapping[str, str], after: Mapping[str, str]
) -> list[str]:
    """Return the variables that an import may have read with another value.

    `at_start` is the server's environment before its imports, and `after` the one after them.
    Some libraries set variables while they are imported (sklearn, torch.compile). A client that
    has imported them passes these on, and in a fresh process the import would find its own value.
    """
    return sorted(
        name
        for name in at_start.keys() | environment.keys()
        if not name.startswith(READ_LATE)
        and name not in READ_LATE_BY_NAME
        and environment.get(name) not in {at_start.get(name), after.get(name)}
    )


def refusal(
    at_start: Mapping[str, str], environment: Mapping[str, str], after: Mapping[str, str]
) -> str | None:
    """Return why a forked child could differ from a fresh process, or None if it cannot."""
    if different := differences(at_start, environment, after):
        return f"the libraries were imported with another {', '.join(different)}"
    if _hides_gpus(at_start) != _hides_gpus(environment):
        return "the libraries were imported with another view of the GPUs"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialized, and its context does not survive a fork"
    if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
        return f"the server has {threads} threads, and only one survives a fork"
    return None


def _hides_gpus(environment: Mapping[str, str]) -> bool:
    visible = environment.get("CUDA_VISIBLE_DEVICES", "all")
    return not visible.strip() or visible.startswith("-1")


def _is_same_user(client: socket.socket) -> bool:
    """Compare the users: every local user can connect to a socket of the abstract namespace."""
    size = struct.calcsize("3i")
    peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = struct.unpack("3i", peer)
    return user == os.geteuid()


def _receive(client: socket.socket, received: contextlib.ExitStack) -> Child:
    """Receive a request. Leaving `received` closes its descriptors."""
    client.settimeout(RECEIVE_SECONDS)
    data, descriptors, _, _ = socket.recv_fds(client, 65536, MAX_DESCRIPTORS)
    for descriptor in descriptors:
        received.callback(os.close, descriptor)
    while not data.endswith(b"\n"):
        if not (more := client.recv(65536)):
            raise ValueError("the request is not complete")
        data += more
    client.settimeout(None)
    return Child(json.loads(data), descriptors)


def _answer(client: socket.socket, **answer: int | str) -> None:
    with contextlib.suppress(OSError):  # the client is gone; its lifeline ends the child
        client.sendall(json.dumps(answer).encode() + b"\n")


def command_of(request: Request) -> list[str]:
    """Return the command line of the fresh process that a child is equal to."""
    return [sys.executable, "-m", request["module"], *request["arguments"]]


def become(child: Child) -> NoReturn:
    """Turn this forked child into the requested process, and run its module to its end."""
    request = child.request
    environment = dict(request["environment"])
    if request["lifeline"] is not None:
        environment["FT_LIFELINE_FD"] = str(child.descriptors[request["lifeline"]])
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    for target, descriptor in enumerate(child.descriptors[:3]):
        os.dup2(descriptor, target)
        os.close(descriptor)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # each import seeds it anew; `random` reseeds itself after a fork
    sys.path[0] = request["cwd"]
    importlib.invalidate_caches()
    sys.argv = [request["module"], *request["arguments"]]
    if not hasattr(sys.modules.get(request["module"]), "__path__"):
        sys.modules.pop(request["module"], None)  # `python -m` executes the module anew
    _run(request["module"])


def _run(module: str) -> NoReturn:
    """Run a module as `__main__`, and end this process with its exit code.

    After an ordinary end the interpreter does all but its last act: it would destroy every module
    and thereby copy the 300 MB that it shares with the server, half a second of each step.
    `multiprocessing` ends its children in the same way. After an exception it does that too.
    """
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    gc.collect()  # closes files that a cycle holds; the server's objects are frozen
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)


def set_command_line(command: Sequence[str]) -> None:
    """Show `command` in /proc/<pid>/cmdline, where `ft gc` and `ps` look for running steps.

    The kernel reads it from the memory that holds argv (proc(5): arg_start and arg_end are fields
    48 and 49 of /proc/<pid>/stat). Python has copied argv and does not read that memory again.
    The last argument of this program makes it long enough.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[48 - 3]), int(fields[49 - 3])  # fields[0] is field 3
    text = b"".join(os.fsencode(argument) + b"\0" for argument in command)
    if not start or len(text) >= end - start:
        raise OSError(f"no room for the command line: {len(text)} of {end - start} bytes")
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _import_all(modules: Sequence[str]) -> None:
    """Import the modules, and end the threads that an import starts and a fork survives."""
    for module in modules:
        importlib.import_module(module)
    if (pid := os.fork()) == 0:  # OpenBLAS ends its threads before a fork, and restarts them lazily
        os._exit(0)
    os.waitpid(pid, 0)
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of all objects that it visits


def main() -> None:
    """Run the server; a child returns from `serve` and becomes the requested process."""
    listener, *modules, _ = sys.argv[1:]
    set_command_line([sys.executable, "-m", "ft_assets.launchers.fork_server", *modules])
    at_start = dict(os.environ)
    os.environ.update({**WHILE_IMPORTING, **os.environ})
    _import_all(modules)
    become(Server(socket.socket(fileno=int(listener)), at_start).serve())


if __name__ == "__main__":
    main()
