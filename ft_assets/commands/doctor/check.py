"""A check of `ft doctor`: a name, a state, a finding and advice. No check raises."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from ft_assets.errors import FtError
from ft_assets.redaction import redacted

OK, WARN, FAIL = "ok", "warn", "fail"
MARKS = {OK: "✓", WARN: "!", FAIL: "✗"}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Check:
    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def ok(name: str, found: str) -> Check:
    return Check(name, OK, found)


def warn(name: str, found: str, advice: str) -> Check:
    return Check(name, WARN, found, advice)


def fail(name: str, found: str, advice: str) -> Check:
    return Check(name, FAIL, found, advice)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def guarded(name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Yield the checks of `look`; what it raises is a failed check too, whatever is broken.

    Libraries print while they are imported: that goes to stderr, so that --json stays JSON.
    """
    done: list[Check] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for check in look():
                done.append(check)
    except FtError as error:
        done.append(
            fail(
                name,
                f"{error.where}: {error.found}",
                "; ".join(text for text in (error.expected, error.fix) if text),
            )
        )
    except Exception as error:  # `ft doctor` must never crash
        done.append(
            fail(
                name,
                first_line(error),
                "the check itself failed; ft run may show the cause",
            )
        )
    for check in done:
        yield replace(check, found=redacted(check.found), advice=redacted(check.advice))


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return the value of a call. Raises TimeoutError.

    A name lookup can hang longer than any timeout of a client.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.extend((call(), None))
        except Exception as error:  # raised again below, in the caller's thread
            outcome.extend((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def table(checks: Iterable[Check]) -> str:
    """Return the checks as text, the advice below what needs it."""
    checks = list(checks)
    wide = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{MARKS[check.state]} {check.name:<{wide}}  {check.found}")
        if check.advice:
            lines.append(f"  {'':<{wide}}  to do: {check.advice}")
    counts = {state: sum(check.state == state for check in checks) for state in (OK, WARN, FAIL)}
    return "\n".join(
        [*lines, "", f"{counts[OK]} ok, {counts[WARN]} to look at, {counts[FAIL]} failed"]
    )
