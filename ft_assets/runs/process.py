"""The process of a run, identified so that another process can test it later. Reads /proc."""

import os
import signal
import socket
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

from ft_assets.hardware import boot_id, process_start

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
            boot=boot_id(),
            pid=pid,
            started=process_start(pid) or 0,
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
        return self.boot == boot_id() and process_start(self.pid) == self.started

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
