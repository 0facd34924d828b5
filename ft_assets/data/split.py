"""Which rows are held out: by hash of their group, so that growing the data never moves a row.

Preference pairs whose prompt stands in the held-out rows are dropped here, and counted.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from ft_assets.errors import DataError


def is_heldout(group: str, share: float, salt: str = "") -> bool:
    """Return the side of a group. Depends on nothing but the group, the share and the salt."""
    value = int.from_bytes(hashlib.sha256(f"{salt}:{group}".encode()).digest()[:8], "big")
    return value / 2**64 < share


def split(
    rows: list[dict[str, Any]], share: float, salt: str, fixed: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Return (train, heldout, removed): with a fixed held-out file, train rows of the same group are removed from train.

    Raises DataError if a side is empty.
    """
    if fixed:
        groups = {row["group"] for row in fixed}
        train = [row for row in rows if row["group"] not in groups]
        heldout = fixed
    else:
        heldout = [row for row in rows if is_heldout(row["group"], share, salt)]
        train = [row for row in rows if not is_heldout(row["group"], share, salt)]
    for name, side in (("train", train), ("held-out", heldout)):
        if not side:
            raise DataError("split", f"no {name} rows out of {len(rows)}", "both sides filled", "add data, or change data.heldout_share")
    return train, heldout, len(rows) - len(train) if fixed else 0


def apart(rows: list[dict[str, Any]], share: float, salt: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (train, validation) of the rows that are not held out, by another hash of the group."""
    watched = [is_heldout(row["group"], share, f"{salt}:validation") for row in rows]
    train = [row for row, flag in zip(rows, watched, strict=True) if not flag]
    return train, [row for row, flag in zip(rows, watched, strict=True) if flag]


def without_groups(rows: Iterable[dict[str, Any]], groups: set[str]) -> list[dict[str, Any]]:
    """Return the rows that share no group with `groups`."""
    return [row for row in rows if row["group"] not in groups]


def overlaps(**sides: Iterable[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return (side, id, other side, id) for each group that stands on two sides."""
    seen: dict[str, tuple[str, str]] = {}
    found = []
    for name, rows in sides.items():
        for row in rows:
            side, identity = seen.setdefault(row["group"], (name, row["id"]))
            if side != name:
                found.append((side, identity, name, row["id"]))
    return found
