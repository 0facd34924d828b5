"""An interrupt (cancelled run, Ctrl-C, launcher gone) ends training at the end of the step, with a checkpoint.

A second one ends it at once. The launcher follows an interrupt with TERM and KILL if a step takes too long.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback


class Interrupt(TrainerCallback):
    """Turns SIGINT into a checkpoint at the end of the step, then into KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False

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
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
