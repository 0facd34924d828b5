"""The process of a run, identified so that another process can test it later. Reads /proc."""

import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

# Of the run: JSON of a RunProcess. The UI hides tags with this prefix.
TAG = ".dagster/ft_worker"
FORMER_TAG = "ft/worker"  # of runs that were started by an older version


class RunProcess(BaseModel):
    """A process of one boot of one machine. The pid alone is not enough: pids are reused."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    host: str
    boot: str  # the kernel's id of this boot
    pid: int
    started: int  # clock ticks after the boot

    @classmethod
    def this(cls, run_id: str) -> "RunProcess":
        """Return the calling process."""
        pid = os.getpid()
        return cls(
            run_id=run_id,
            host=socket.gethostname(),
            boot=_boot(),
            pid=pid,
            started=_started(pid) or 0,
        )

    @classmethod
    def of(cls, run_id: str, tags: Mapping[str, str]) -> "RunProcess | None":
        """Return the process in the tags of a run, or None.

        A retry inherits the tags of the run before it, and with them a process that is not its own.
        """
        try:
            found = cls.model_validate_json(tags.get(TAG) or tags.get(FORMER_TAG, ""))
        except ValidationError:
            return None
        return found if found.run_id == run_id else None

    @property
    def here(self) -> bool:
        """Whether it was started on this machine, in this boot or an earlier one."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether exactly this process runs. Valid only if it is `here`."""
        return self.boot == _boot() and _started(self.pid) == self.started

    def terminate(self) -> bool:
        """Send it TERM, which Dagster takes as a request to stop. Returns False if it has ended."""
        try:
            handle = os.pidfd_open(
                self.pid
            )  # stays this process also if its number is given out again meanwhile
        except ProcessLookupError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(handle, signal.SIGTERM)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int | None:
    """Return the start of a process in clock ticks; None if it has ended, also as a zombie."""
    try:
        # The name in parentheses may hold anything; what follows are the fields from 3 on: 3 is the
        # state, 22 the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
