"""An interrupt ends training after the current step, with a checkpoint.

That is a cancelled run, Ctrl-C, or a launcher that is gone.

A second interrupt within the time that the launcher grants for the checkpoint is ignored: systemd
sends one to each process of a service, and the launcher, which got one too, then sends its own.
The launcher follows with TERM and KILL if a step takes too long.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

CHECKPOINT_SECONDS = 25.0  # a little more than the local launcher's grace period after INT


class Interrupt(TrainerCallback):
    """Turn SIGINT into a checkpoint at the end of the step, then into KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self.first = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGINT inside the block.

        Outside the main thread Python allows no signal handlers; then the block changes nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(*_: Any) -> None:
            if self.requested and time.monotonic() - self.first > CHECKPOINT_SECONDS:
                raise KeyboardInterrupt
            if not self.requested:
                self.requested = True
                self.first = time.monotonic()

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
