"""A row of a user's file, as its reader found it."""

from dataclasses import dataclass
from typing import Any

from ft_assets.rows.columns import IDS
from ft_assets.rows.types import RawFields

LONGEST_ID = 80  # characters


@dataclass(frozen=True)
class RawRow:
    """A row of a file; `problem` is the reason why it is not an object.

    `left_out`: the name under which a row that is left out and not wrong is counted.
    """

    where: str
    value: RawFields | None
    problem: str | None = None
    left_out: str = ""

    @property
    def named(self) -> str:
        """The file and line of the row, with the id that the user has for it, if any."""
        for key in IDS if self.value else ():
            own = self.value.get(key) if self.value else None
            if isinstance(own, str | int) and not isinstance(own, bool) and str(own).strip():
                return f"{self.where} (id {str(own)[:LONGEST_ID]})"
        return self.where

    @classmethod
    def of(cls, where: str, value: Any) -> "RawRow":
        """Return the row of a JSON value, which is a problem if the value is no object."""
        if isinstance(value, dict):
            return cls(where, value)
        return cls(where, None, f"is a {type(value).__name__}, not an object")
