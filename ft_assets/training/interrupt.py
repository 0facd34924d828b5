"""An interrupt (cancelled run, Ctrl-C, launcher gone) ends training at the end of the step, with a checkpoint.

Another one within the time that the launcher gives for the checkpoint says nothing new: systemd sends one to each process of
a service, and then the launcher, which got one too, sends its own. The launcher follows with TERM and KILL if a step takes too
long.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

CHECKPOINT_SECONDS = 25.0  # somewhat more than local.py's grace after INT


class Interrupt(TrainerCallback):
    """Turns SIGINT into a checkpoint at the end of the step, then into KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self.first = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context in which SIGINT is taken. Outside the main thread Python lets nobody listen: then it changes nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(*_: Any) -> None:
            if self.asked and time.monotonic() - self.first > CHECKPOINT_SECONDS:
                raise KeyboardInterrupt
            if not self.asked:
                self.asked, self.first = True, time.monotonic()

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
