"""Limit the time and the memory of a chat template, which is a program of the model's author.

transformers renders it in a sandbox, which limits what it reaches and not how long it runs.
"""

import contextlib
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ft_assets.errors import TemplateError

PROBE_SECONDS = 3  # of CPU time for all probes; a real template needs milliseconds
PROBE_MEMORY = 2 << 30  # bytes beside those of this process
WAIT_FACTOR = 20  # wall time in units of CPU time: the machine may be busy
RENDER_SECONDS = 30.0  # of CPU time for one conversation; 2 MB take less than one
SYNTAX, MEMORY = "syntax: ", "memory"
SYSTEM = {"role": "system", "content": "zqsystem"}
QUESTION = {"role": "user", "content": "zqquestion"}
ANSWER = {"role": "assistant", "content": "zqanswer"}
PROBES = ([QUESTION], [QUESTION, ANSWER], [SYSTEM, QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION])


def require_ends(where: str, tokenizer: Any) -> None:
    """Raise TemplateError unless the tokenizer's template can be parsed and ends soon.

    A forked process renders short conversations. It can be ended at any point, and its memory is
    limited. A template that refuses a conversation ends, too: the proofs of the rows report it.
    """
    told, signalled = _in_child(lambda: _problem_of(tokenizer))
    if told.startswith(SYNTAX):
        found, fix = f"cannot be parsed: {told.removeprefix(SYNTAX)}", "correct the template"
    elif signalled or told == MEMORY:
        limit = (
            f"{PROBE_MEMORY >> 30} GB of memory"
            if told == MEMORY
            else f"{PROBE_SECONDS} s of CPU time"
        )
        found = f"does not write one question and one answer within {limit}"
        fix = "correct the template, or set chat.chat_template to another one: it loops, or grows"
    else:
        return
    raise TemplateError(
        where=where, found=f"the chat template {found}", expected="a template that ends", fix=fix
    )


def _problem_of(tokenizer: Any) -> str:
    from jinja2 import TemplateSyntaxError

    for probe in PROBES:
        for prompted in (False, True):
            try:
                tokenizer.apply_chat_template(probe, add_generation_prompt=prompted, tokenize=False)
            except TemplateSyntaxError as error:
                return f"{SYNTAX}line {error.lineno}: {error.message}"
            except MemoryError:
                return MEMORY
            except Exception:  # it refuses this conversation
                continue
    return ""


def _in_child(work: Callable[[], str]) -> tuple[str, bool]:
    """Return (what a forked process tells, whether a signal ended it)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (PROBE_SECONDS, PROBE_SECONDS))
            with open("/proc/self/statm") as sizes:
                mapped = int(sizes.read().split()[0]) * resource.getpagesize()
            most = mapped + PROBE_MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            os.write(writing, work().encode(errors="replace"))
        os._exit(0)
    os.close(writing)
    try:
        told = _read(reading, time.monotonic() + WAIT_FACTOR * PROBE_SECONDS)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return told.decode(errors="replace"), told == b"" and os.WIFSIGNALED(status)


def _read(descriptor: int, deadline: float) -> bytes:
    """Read until the end of a pipe, or until the deadline."""
    waiting, told = select.poll(), b""
    waiting.register(descriptor, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0 and waiting.poll(1000 * left):
        if not (part := os.read(descriptor, 1 << 16)):
            break
        told += part
    return told


class TooLong(Exception):
    """A conversation took longer than its limit."""


@contextlib.contextmanager
def limited(seconds: float = RENDER_SECONDS) -> Iterator[None]:
    """Raise TooLong if the block takes more CPU time; only the main thread has such a limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again, if a template's filter caught it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TooLong
