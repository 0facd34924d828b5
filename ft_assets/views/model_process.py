"""Ask the models side by side in a process of their own, which ends when it is idle.

The webserver imports no torch. `answering.py` is the process. It starts on the first question, and
again for another base model or release. It ends when nobody asks, when somebody stops it, when the
webserver ends, and when a step needs the GPU.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ft_assets.artifacts import ArtifactStore
from ft_assets.errors import FtError
from ft_assets.hardware import visible_gpus

IDLE_SECONDS = 600.0
WATCH_SECONDS = 5.0
STOPPED = "stopped"
COMMAND = (sys.executable, "-m", "ft_assets.views.answering")


@dataclass(frozen=True)
class Asked:
    """A question and what is answered so far: (who, text) of each model.

    note: what the process does now. error: why there is no answer.
    """

    number: int
    answers: tuple[tuple[str, str], ...] = ()
    note: str = "starting the models' process"
    error: str | None = None
    done: bool = False


class ModelProcess:
    """One process for all pages. A question waits for none: it is refused while one is asked.

    busy: a sentence if a step holds the GPU, else None. It is asked only where there is a GPU.
    """

    def __init__(
        self,
        busy: Callable[[], str | None],
        command: tuple[str, ...] = COMMAND,
        gpu: Callable[[], bool] = lambda: bool(visible_gpus()),
    ) -> None:
        self._busy, self._command, self._gpu = busy, command, gpu
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._key: tuple[str, ...] = ()
        self._asked = Asked(0, note="", done=True)

    @property
    def running(self) -> bool:
        """Whether the process runs, and so holds its memory."""
        return self._process is not None and self._process.poll() is None

    def ask(self, key: tuple[str, ...], message: str, system: str | None, log: Path) -> Asked:
        """Send a question and return its state. Raises FtError if it cannot be asked now.

        key: the base model's name, and what its models are made of. log: the file for the stderr
        of the process.
        """
        with self._lock:
            if not self._asked.done:
                raise FtError(
                    where="chat",
                    found="another question is being answered",
                    expected="one question at a time",
                    fix="wait for its answers, or stop it",
                )
            if self._gpu() and (busy := self._busy()):
                raise FtError(
                    where="chat",
                    found=busy,
                    expected="a GPU that no step uses: the models could take its memory",
                    fix="ask when the run has ended",
                )
            if not self.running or self._key != key:
                self._end()
                self._start(key, log)
            self._asked = Asked(self._asked.number + 1)
            line = json.dumps({"message": message, "system": system}).encode() + b"\n"
            with contextlib.suppress(BrokenPipeError):  # the reader tells that it ended
                process = self._process
                assert process is not None and process.stdin is not None, "it has started"
                process.stdin.write(line)
                process.stdin.flush()
            return self._asked

    def state(self) -> Asked:
        """Return the last question with its answers so far."""
        return self._asked

    def stop(self, reason: str = STOPPED) -> None:
        """End the process, and with it a question that is being answered."""
        with self._lock:
            if not self._asked.done:
                self._asked = replace(self._asked, error=reason, done=True)
            self._end()

    def _start(self, key: tuple[str, ...], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*self._command, key[0], str(IDLE_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Beside other work, threads that spin while they wait take most of the time.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            )
        self._key = key
        for follow in (self._read, self._watch):
            threading.Thread(target=follow, args=(self._process, log), daemon=True).start()

    def _read(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Follow the answers of a process to its end."""
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            with self._lock:
                if process is self._process and not self._asked.done:
                    self._asked = _followed(self._asked, json.loads(line))
        code = process.wait()
        with self._lock:
            if process is self._process and not self._asked.done:
                reason = f"the models' process ended with code {code}; its last words are in {log}"
                self._asked = replace(self._asked, error=reason, done=True)

    def _watch(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """End a process when a step needs the GPU that it uses."""
        if not self._gpu():
            return
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(WATCH_SECONDS)
                return
            with self._lock:
                if process is self._process and (busy := self._busy()):
                    self.stop(busy)
                    return

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.kill()  # it writes nothing
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _followed(asked: Asked, told: dict[str, Any]) -> Asked:
    """Return the state of a question after a line of the process."""
    if "who" in told:
        return replace(asked, answers=(*asked.answers, (told["who"], told["text"])))
    if "note" in told:
        return replace(asked, note=told["note"])
    return replace(asked, error=told.get("error"), done=True, note="")


def models_key(store: ArtifactStore, base_model: str) -> tuple[str, ...]:
    """Return what the models of a base model are made of. Another key needs another process.

    Raises ArtifactError without a merged model.
    """
    made = [store.need("base_model", base_model), store.need("merged_model", base_model)]
    released = store.current("release", base_model)
    return (base_model, *(one.fingerprint for one in [*made, *([released] if released else [])]))
