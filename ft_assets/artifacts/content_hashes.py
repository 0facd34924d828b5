"""SHA-256 of large files, recomputed only if a file may have changed.

A plan reads the weights of every base each minute. A file is the same file if its size, its times
of content and of inode (nanoseconds), and its inode are the same: the time of the inode is the
kernel's, so a copy with an old modification time is found as well.
"""

import contextlib
import json
import os
import time
import uuid
from pathlib import Path

from ft_assets.artifacts.manifest import file_sha256

# A write within the clock's step may leave the times as they are, so a hash of a file that changed
# a moment ago is not kept.
SETTLED_SECONDS = 2.0
State = list[int]


class ContentHashes:
    """Hashes of files, kept in a JSON file: {path: [[size, mtime, ctime, inode], hash]}."""

    def __init__(self, kept: Path) -> None:
        self._kept = kept
        try:
            self._known: dict[str, tuple[State, str]] = json.loads(kept.read_text())
        except (OSError, ValueError):  # it is a cache: without it, everything is hashed
            self._known = {}

    def of(self, path: Path) -> str:
        """Return the hash of a file's content. Raises OSError."""
        path = path.resolve()
        before = _state(path)
        known = self._known.get(str(path))
        if known is not None and known[0] == before:
            return known[1]
        found = file_sha256(path)
        newest = max(before[1], before[2]) / 1e9
        if _state(path) == before and newest < time.time() - SETTLED_SECONDS:
            self._known[str(path)] = (before, found)
            self._write()
        return found

    def _write(self) -> None:
        made = self._kept.with_name(f".{self._kept.name}-{uuid.uuid4().hex}")
        with contextlib.suppress(
            OSError
        ):  # a folder that cannot be written: hashed again next time
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(json.dumps(self._known))
            os.replace(made, self._kept)


def _state(path: Path) -> State:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
