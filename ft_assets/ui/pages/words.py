"""Numbers and times as text, for the templates: the filters `number`, `signed`, `duration`, …"""

import time

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits after the point."""
    return NONE if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Return a difference with its sign."""
    return NONE if value is None else f"{value:+.{digits}f}"


def duration(seconds: float | None) -> str:
    """Return a time span: 4 s, 12 min, 3.5 h."""
    if seconds is None:
        return NONE
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def ago(seconds: float | None, now: float) -> str:
    """Return how long before `now` a time was."""
    if seconds is None:
        return NONE
    past = max(0.0, now - seconds)
    if past < 172_800:
        return f"{duration(past)} ago"
    return f"{past / 86_400:.0f} days ago"


def utc(seconds: float | None) -> str:
    """Return a time as `2025-01-31 12:00 UTC`."""
    if seconds is None:
        return NONE
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def short(version: str | None) -> str:
    """Return the first characters of a fingerprint."""
    return NONE if version is None else version[:8]


def last_line(text: str) -> str:
    """Return the last line of a prompt, at most 120 characters of it, without its role."""
    line = (text.strip().splitlines() or [""])[-1].removeprefix("user: ")
    return line if len(line) <= 120 else f"{line[:120]}…"


FILTERS = {
    "last_line": last_line,
    "number": number,
    "signed": signed,
    "duration": duration,
    "ago": ago,
    "utc": utc,
    "short": short,
}
