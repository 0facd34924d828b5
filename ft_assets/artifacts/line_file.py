"""A file of JSON lines that a step extends as it goes, and that a later try reads."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path


class LineFile:
    """Lines that survive a kill. A last line that was cut off is none, and is removed."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock, self._whole = file, threading.Lock(), False

    def read(self) -> list[bytes]:
        """Return the whole lines, [] without a file."""
        return self._file.read_bytes().split(b"\n")[:-1] if self._file.exists() else []

    def add(self, lines: Iterable[str]) -> None:
        """Append lines to the disk, after the last whole one."""
        with self._lock:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab+") as file:
                if not self._whole:
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                    self._whole = True
                file.writelines(line.encode() + b"\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
