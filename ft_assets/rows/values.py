"""Check single values of a raw row: texts, names, JSON.

A value that cannot be used raises RowProblem.
"""

import json
import string
from typing import Any

LONGEST_PROBLEM = 600  # characters: a row can have keys of any length


class RowProblem(Exception):
    """The reason why a row cannot be used, as text that can be stored whatever the row holds."""

    def __init__(self, problem: str) -> None:
        if len(problem) > LONGEST_PROBLEM:
            problem = f"{problem[:LONGEST_PROBLEM]}…"
        super().__init__(problem.encode("utf-8", "backslashreplace").decode())


class LeftOut(RowProblem):
    """The reason why a row that is not wrong is left out. It is counted apart, under `count`."""

    def __init__(self, problem: str, count: str) -> None:
        super().__init__(problem)
        self.count = count


class Tie(LeftOut):
    """The reason why a row holds no preference: its answers are equally good."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, "ties")


def shown(value: Any) -> str:
    """Return a value for a message; a value that is nested too deeply is shown by its type."""
    try:
        return repr(value)
    except RecursionError:
        return f"a {type(value).__name__}"


# Blanks, and letters without width or ink, which make an empty text look like one.
INVISIBLE = string.whitespace + "\x85\xa0\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u3000\ufeff"


def text(where: str, value: Any, empty: bool = False) -> str:
    """Return a text that can be trained on. Raises RowProblem."""
    if not isinstance(value, str):
        raise RowProblem(f"{where}: content is {_kind(value)}; expected text")
    if not empty and not value.strip().strip(INVISIBLE):
        raise RowProblem(f"{where}: empty content")
    if "\x00" in value:
        raise RowProblem(f"{where}: holds a NUL character; expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem(f"{where}: holds half of a surrogate pair; expected text") from None
    return value


def word(where: str, value: Any) -> str:
    """Return a name or an id. Raises RowProblem."""
    if not isinstance(value, str):
        raise RowProblem(f"{where}: is {_kind(value)}; expected a name")
    return text(where, value)


def parsed(where: str, value: str) -> Any:
    """Return the value of a JSON text. Raises RowProblem."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"{where}: is not JSON ({error})") from None


def require_json(where: str, value: Any) -> None:
    """Raise RowProblem for a value that JSON cannot hold.

    JSON cannot hold NaN, the dates and bytes of a table, and half of a surrogate pair.
    """
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False, sort_keys=True).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise RowProblem(f"{where}: holds what JSON cannot ({error})") from None


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
