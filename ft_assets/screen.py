"""The outer handler of every entry point: any error ends as one screen of text.

A screen says what happened, where the details are, and what to do. A stack trace is a detail: it
is written to a file. FT_DEBUG=1 shows it in the terminal too.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import locale
import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from ft_assets.errors import FtError, InfrastructureFault, StepFailed
from ft_assets.redaction import guard_stream, redacted
from ft_assets.system_errors import explained

DEBUG = "FT_DEBUG"
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 128 + signal.SIGINT  # the exit code of a shell
BROKEN_PIPE = 1  # as Typer ends
MESSAGE_LINES, LINE_LENGTH = 12, 400
REPORT = (
    "this is a fault of ft_assets or of a library: read the file, which may quote your data, and "
    "report the fault with it"
)


@contextlib.contextmanager
def one_screen(doing: str, logs: Path | None = None) -> Iterator[None]:
    """End the process with one screen of text if an error leaves the block.

    What the process writes to stderr from here on has no secrets.

    doing: the command, as a person knows it. logs: the folder for details.
    """
    _open_streams()
    guard_stream(sys.stderr)
    try:
        yield
        _flush()
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except BrokenPipeError:  # e.g. `ft report | head`
        _mute()
        sys.exit(BROKEN_PIPE)
    except SystemExit as ended:
        _end_flushed(ended)
    except Exception as error:  # whatever is not ours
        text, code = screen_of(error, doing, logs)
        _end(f"error: {text}", code)


def screen_of(error: Exception, doing: str, logs: Path | None = None) -> tuple[str, int]:
    """Return (one screen of text, the exit code) for any error. Writes the details of a fault."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, FtError | StepFailed):
        return str(error), error.exit_code
    if isinstance(error, InfrastructureFault):
        again = "  to do:    nothing to change in the project; try again later"
        return f"{error}\n{again}", error.exit_code
    if (known := explained(error)) is not None:
        return str(known), known.exit_code
    details = None
    with contextlib.suppress(Exception):  # nothing may hide the screen
        details = save_details(error, doing, logs)
    return (
        f"{doing} failed unexpectedly: {summary(error)}\n"
        f"  details:  {details or f'set {DEBUG}=1 to see the stack trace'}\n"
        f"  to do:    {REPORT if details else 'report it with the stack trace'}",
        UNEXPECTED,
    )


def summary(error: BaseException) -> str:
    """Return the class and the message of an error in a few lines, with the place in our code."""
    lines = [
        line[:LINE_LENGTH] for line in redacted(str(error)).strip().splitlines()[:MESSAGE_LINES]
    ]
    name = type(error).__name__
    text = f"{name}: " + "\n    ".join(lines) if lines else name
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}ft_assets{os.sep}" in frame.filename]
    if not ours:
        return text
    last = ours[-1]
    inner = last.filename.rpartition(f"{os.sep}ft_assets{os.sep}")[2]
    return f"{text} (ft_assets/{inner}:{last.lineno})"


def save_details(error: BaseException, doing: str, logs: Path | None = None) -> Path | None:
    """Write the stack trace of an error to a file that only this user reads, and return its path.

    The folder is `logs`, else .ft/logs of the project, else the one for temporary files. Return
    None if none of them can be written. An error that repeats, e.g. at each tick of a sensor, has
    one file.
    """
    text = "".join(
        [
            f"{doing}, ft_assets {importlib.metadata.version('ft_assets')}, Python "
            f"{platform.python_version()}, {platform.platform()}\n\n",
            redacted("".join(traceback.format_exception(error))),
        ]
    )
    name = f"error-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:10]}.txt"
    for folder in _folders(logs):
        path = folder / f"ft-{name}"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_NOFOLLOW | os.O_WRONLY, 0o600)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return path
    return None


def _folders(logs: Path | None) -> Iterator[Path]:
    """Yield the folders for details, the best first."""
    from ft_assets.config import find_config

    if logs is not None:
        yield logs
    with contextlib.suppress(FtError, OSError):
        yield find_config().parent / ".ft" / "logs"
    with contextlib.suppress(OSError):  # raised if no folder for temporary files can be written
        yield Path(tempfile.gettempdir())


def _open_streams() -> None:
    """Open what the caller closed (`ft plan >&-`) as nothing.

    Otherwise the next file that is opened, e.g. a database, takes the number of the output.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115


def plain_output() -> None:
    """Make this process and its children read and write UTF-8, whatever the locale is.

    What the terminal cannot show is written as an escape: a name in a file may be no text at all.
    """
    if not sys.flags.utf8_mode and locale.getencoding().lower() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(text: str, code: int) -> None:
    with contextlib.suppress(OSError, AttributeError, ValueError):  # stderr may be closed
        print(text, file=sys.stderr)
    with contextlib.suppress(OSError):
        _flush()
    _mute()
    sys.exit(code)


def _end_flushed(ended: SystemExit) -> None:
    """Pass on the exit, unless what was printed cannot be written."""
    try:
        _flush()
    except BrokenPipeError:
        _mute()
        raise SystemExit(BROKEN_PIPE) from None
    raise ended


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _mute() -> None:
    """Write what is left in stdout's buffer nowhere: the interpreter flushes it at its end."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
