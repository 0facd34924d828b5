"""The lease on the making of a version: one run at a time works with its checkpoints.

The lease is a file beside the checkpoints. It tells who has it, and a count that the holder changes
every `beat_seconds`. Another run that wants the version waits. It takes the lease over

- at once, from an earlier try of its own run, and from a process of this machine that has ended
- after `silent_seconds` without a new count, as the waiting run's own clock measures them. The
  clocks of two machines need not agree.

Each holder works in a folder of its own: a takeover renames the one before. So a holder that wakes
up later (it was stopped, or lost the disk) cannot write into checkpoints that are not its own any
more, and `require` ends it before it publishes.
"""

import contextlib
import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ft_assets.artifacts.disk import fsync, write_durably
from ft_assets.artifacts.store import ArtifactStore
from ft_assets.errors import ArtifactError, LeaseLost, StoreBusy
from ft_assets.hardware import boot_id, process_namespace, process_start

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
REMIND_SECONDS = 300.0
Say = Callable[[str], object]


class Holder(BaseModel):
    """The process that has a lease. boot, processes, started: what tells it from another pid."""

    model_config = ConfigDict(frozen=True)

    token: str
    run_id: str
    host: str
    boot: str
    processes: str
    pid: int
    started: int
    since: str
    beat: int = 0

    @classmethod
    def this(cls, run_id: str) -> Self:
        """Return the calling process with a token of its own."""
        return cls(
            token=uuid.uuid4().hex[:12],
            run_id=run_id,
            host=socket.gethostname(),
            boot=boot_id(),
            processes=process_namespace(),
            pid=os.getpid(),
            started=process_start(os.getpid()) or 0,
            since=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
        )

    @property
    def ended(self) -> bool:
        """Whether this machine can see that the process is gone. Unknown counts as no."""
        here = bool(self.boot) and (self.boot, self.processes) == (boot_id(), process_namespace())
        return here and process_start(self.pid) != self.started

    def __str__(self) -> str:
        return f"run {self.run_id} (process {self.pid} on {self.host}) since {self.since}"


class Lease:
    """A context manager: waits for the lease on a version, keeps it alive, and gives it back."""

    def __init__(
        self,
        store: ArtifactStore,
        asset: str,
        partition: str | None,
        version: str,
        run_id: str,
        say: Say,
        beat_seconds: float = BEAT_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self._store, self._say = store, say
        self._asset, self._partition = asset, partition
        self._resting = store.checkpoints(asset, partition, version)
        self._file = self._resting.with_name(f"{version}.lease")
        self._me = Holder.this(run_id)
        self._beat_seconds, self._silent_seconds = beat_seconds, silent_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)

    @property
    def folder(self) -> Path:
        """The folder for the checkpoints of this holder."""
        return self._folder_of(self._me)

    def require(self) -> None:
        """Raise LeaseLost if another run has taken the lease over."""
        holder = _parsed(_read(self._file))
        if holder is None or holder.token != self._me.token:
            raise LeaseLost(self._where, _named(holder))

    def __enter__(self) -> Self:
        watch = _Watch(self._silent_seconds)
        reminded: float | None = None
        while (other := self._try_to_take(watch)) is not None:
            if reminded is None or time.monotonic() - reminded > REMIND_SECONDS:
                reminded = time.monotonic()
                self._say(
                    f"{self._where} is being made by {other}, last sign of life "
                    f"{_age(self._file):.0f} s ago. This run waits for it; cancel one of the two "
                    "if that is not wanted"
                )
            time.sleep(min(1.0, self._beat_seconds / 2))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        # Another run takes over what cannot be given back now.
        with (
            contextlib.suppress(LeaseLost, StoreBusy, OSError, ArtifactError),
            self._store.lock(self._asset, self._partition),
        ):
            self.require()
            if self.folder.exists():
                os.rename(self.folder, self._resting)
            self._file.unlink()

    @property
    def _where(self) -> str:
        return f"{self._asset}[{self._partition}]" if self._partition else self._asset

    def _folder_of(self, holder: Holder) -> Path:
        return self._resting.with_name(f"{self._resting.name}.{holder.token}")

    def _try_to_take(self, watch: "_Watch") -> str | None:
        """Take the lease and return None, or return who has it."""
        data = _read(self._file)
        holder, silent = _parsed(data), data is not None and watch.is_silent(data)
        if data is not None and not silent and not (holder and self._is_mine_or_ended(holder)):
            return _named(holder)
        with self._store.lock(self._asset, self._partition):
            if (now := _read(self._file)) != data:
                return _named(_parsed(now))  # it beats, or another run was faster
            if holder is not None:
                self._say(f"{self._where}: takes over from {holder}, which gives no sign of life")
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._file, self._me.model_dump_json().encode())
            self._move_checkpoints(holder)
        return None

    def _is_mine_or_ended(self, holder: Holder) -> bool:
        return holder.run_id == self._me.run_id or holder.ended

    def _move_checkpoints(self, before: Holder | None) -> None:
        """Rename the checkpoints of the holder before; else those that were given back."""
        others = sorted(
            (
                path
                for path in self._resting.parent.glob(f"{self._resting.name}.*")
                if path.is_dir()
            ),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        )
        known = [self._folder_of(before)] if before else []
        found = next((path for path in [*known, self._resting, *others] if path.exists()), None)
        if found is not None:
            os.rename(found, self.folder)
            fsync(self.folder.parent)

    def _keep_alive(self) -> None:
        """Change the count in the file until the end, or until another run has the lease.

        In place: a takeover replaces the file, so a late beat reaches only the old one. NFS may
        also show a renamed file late.
        """
        beat = 0
        while not self._over.wait(self._beat_seconds):
            beat += 1
            with contextlib.suppress(OSError), self._file.open("r+b") as file:
                holder = _parsed(file.read())
                if holder is None or holder.token != self._me.token:
                    return
                file.seek(0)
                file.write(self._me.model_copy(update={"beat": beat}).model_dump_json().encode())


class _Watch:
    """Measures with this process's clock for how long a file has not changed."""

    def __init__(self, silent_seconds: float) -> None:
        self._silent_seconds = silent_seconds
        self._seen: bytes | None = None
        self._since = time.monotonic()

    def is_silent(self, data: bytes) -> bool:
        if data != self._seen:
            self._seen, self._since = data, time.monotonic()
        return time.monotonic() - self._since >= self._silent_seconds


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _parsed(data: bytes | None) -> Holder | None:
    try:
        return None if data is None else Holder.model_validate_json(data)
    except ValidationError:
        return None


def _named(holder: Holder | None) -> str:
    return str(holder) if holder else "another run, whose lease cannot be read"


def _age(file: Path) -> float:
    """Return the seconds since the last change, by the clocks; for a message only."""
    with contextlib.suppress(OSError):
        return max(0.0, time.time() - file.stat().st_mtime)
    return 0.0
