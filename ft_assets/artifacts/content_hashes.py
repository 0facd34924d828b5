"""SHA-256 of large files, recomputed only if a file may have changed.

A plan reads the weights of every base each minute. A file is the same file if its size, its times
of content and of inode (nanoseconds), and its inode are the same: the time of the inode is the
kernel's, so a copy with an old modification time is found as well. A disk that loses a bit changes
none of them, so each hash has the time of its reading, and a reader can ask for a recent one.
"""

import contextlib
import functools
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from ft_assets.artifacts.manifest import file_sha256

# A write within the clock's step may leave the times as they are, so a hash of a file that changed
# a moment ago is not kept.
SETTLED_SECONDS = 2.0
FOR_EVER = float("inf")
State = list[int | str]
Known = dict[str, tuple[State, str, float]]  # {name: (state, hash, read at)}


class ContentHashes:
    """Hashes of files, kept in a JSON file: {path: [[size, mtime, ctime, inode], hash, read at]}.

    max_age: a hash that was read longer ago, in seconds, is read again. write_every: the seconds
    between two writes of the JSON file; `save` writes the rest. Threads can share an instance.
    `read_bytes`: the bytes that were read so far, because the cache did not have their hash.
    """

    def __init__(self, kept: Path, *, max_age: float = FOR_EVER, write_every: float = 0.0) -> None:
        self._kept, self._write_every = kept, write_every
        self._oldest = time.time() - max_age
        self._known = dict(_read(kept, _state_of_file(kept)))
        self._lock = threading.Lock()
        self._written = time.monotonic()
        self._dirty = self._held = False
        self.read_bytes = 0

    def of(self, path: Path) -> str:
        """Return the hash of a file's content. Raises OSError."""
        path = path.resolve()
        before = _state(path)
        if (known := self.known(str(path), before)) is not None:
            return known
        found = file_sha256(path)
        newest = max(int(before[1]), int(before[2])) / 1e9
        settled = _state(path) == before and newest < time.time() - SETTLED_SECONDS
        self.note(str(path), before, found, int(before[0]), keep=settled)
        return found

    def known(self, name: str, state: State) -> str | None:
        """Return the hash that is kept for a file in this state, if it is recent enough."""
        with self._lock:
            state_then, found, read_at = self._known.get(name, ([], "", 0.0))
        return found if state_then == state and read_at >= self._oldest else None

    def note(self, name: str, state: State, found: str, size: int, *, keep: bool = True) -> None:
        """Count the bytes of a file that was read now, and keep its hash."""
        with self._lock:
            self.read_bytes += size
            if keep:
                self._known[name] = (state, found, time.time())
                self._dirty = True
        if time.monotonic() - self._written >= self._write_every:
            self.save()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Write the new hashes once, at the end of the block. Each write is of all hashes."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.save()

    def save(self, gone: Callable[[str], bool] | None = None) -> None:
        """Write the new hashes to the disk. gone: True for the name of a file to forget."""
        with self._lock:
            if self._held:
                return
            self._written = time.monotonic()
            if gone is not None:
                kept = {name: entry for name, entry in self._known.items() if not gone(name)}
                self._dirty = self._dirty or len(kept) < len(self._known)
                self._known = kept
            if not self._dirty:
                return
            self._dirty = False
            text = json.dumps(self._known)
        made = self._kept.with_name(f".{self._kept.name}-{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):  # a folder that cannot be written: hashed again
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(text)
            os.replace(made, self._kept)


def _state_of_file(kept: Path) -> tuple[int | str, ...]:
    try:
        return tuple(_state(kept))
    except OSError:
        return ()


@functools.lru_cache(maxsize=4)
def _read(kept: Path, state: tuple[int | str, ...]) -> Known:
    """Return the hashes of a file in this state. It is a cache: without it, everything is hashed.

    A plan opens it once for each base model, so its content is kept until it changes.
    """
    try:
        return {
            name: (list(state), str(found), float(read_at))
            for name, (state, found, read_at) in json.loads(kept.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _state(path: Path) -> State:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
