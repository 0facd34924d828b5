"""Which rows are held out, and what is left to train on.

By hash of a row's group: growing the data never moves a row. What is trained and stands in the held-out or general rows
too, or is nearly the same, is left out of training, and counted.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ft_assets.data.near import near_duplicates
from ft_assets.errors import DataError

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """The sides by name (train with rehearsal, validation, heldout, retention, preferences), the near-duplicates that
    were left out ({"side", "id", "of", "similarity"}), and the counts of everything."""

    sides: dict[str, Rows]
    copies: Rows
    counts: dict[str, Any]


def make_split(rows: dict[str, Rows], share: float, validation_share: float, salt: str, near_duplicate: float | None) -> Split:
    """Return the split of conversations, rehearsal, heldout (fixed, or empty), retention and preferences.

    Raises DataError if no train or no held-out row is left.
    """
    rest, heldout = (without_groups(rows["conversations"], _groups(rows["heldout"])), rows["heldout"])
    if not heldout:
        rest, heldout = _apart(rows["conversations"], share, salt)
    kept_out = [*heldout, *rows["retention"]]
    trained = {"train": rest, "rehearsal": rows["rehearsal"], "preferences": rows["preferences"]}
    trained = {name: without_groups(side, _groups(kept_out)) for name, side in trained.items()}
    copies = _remove_copies(trained, kept_out, near_duplicate)
    train, validation = _apart(trained["train"], validation_share, f"{salt}:validation")
    for name, side in (("train", train), ("held-out", heldout)):
        if not side:
            raise DataError(
                "split",
                f"no {name} rows out of {len(rows['conversations'])}",
                "both sides filled",
                "add data, or change data.heldout_share",
            )
    task = len(rows["conversations"]) - (0 if rows["heldout"] else len(heldout))
    counts = {
        "train_rows": len(train),
        "rehearsal_rows": len(trained["rehearsal"]),
        "validation_rows": len(validation),
        "heldout_rows": len(heldout),
        "retention_rows": len(rows["retention"]),
        "preference_pairs": len(trained["preferences"]),
        "train_rows_removed": task - len(train) - len(validation),
        "rehearsal_rows_removed": len(rows["rehearsal"]) - len(trained["rehearsal"]),
        "pairs_removed": len(rows["preferences"]) - len(trained["preferences"]),
        "near_duplicates_removed": len({(copy["side"], copy["id"]) for copy in copies}),
        "first_near_duplicate": "{side} {id} of {of}: {similarity:.2f}".format(**copies[0]) if copies else None,
    }
    sides = {"train": [*train, *trained["rehearsal"]], "validation": validation, "heldout": heldout, "retention": rows["retention"]}
    return Split({**sides, "preferences": trained["preferences"]}, copies, counts)


def is_heldout(group: str, share: float, salt: str = "") -> bool:
    """Return the side of a group. Depends on nothing but the group, the share and the salt."""
    value = int.from_bytes(hashlib.sha256(f"{salt}:{group}".encode()).digest()[:8], "big")
    return value / 2**64 < share


def without_groups(rows: Iterable[dict[str, Any]], groups: set[str]) -> Rows:
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


def _groups(rows: Rows) -> set[str]:
    return {row["group"] for row in rows}


def _apart(rows: Rows, share: float, salt: str) -> tuple[Rows, Rows]:
    """Return (rows that stay, rows that are set apart)."""
    flags = [is_heldout(row["group"], share, salt) for row in rows]
    return (
        [row for row, flag in zip(rows, flags, strict=True) if not flag],
        [row for row, flag in zip(rows, flags, strict=True) if flag],
    )


def _remove_copies(trained: dict[str, Rows], kept_out: Rows, threshold: float | None) -> Rows:
    """Take near-duplicates of kept-out rows out of all sides of `trained`; return them.

    Repeated until none is found: what counts as a common instruction depends on the rows that are left, and the check
    `nothing_leaks` asks the same of the same rows.
    """
    copies: Rows = []
    while threshold and (matches := near_duplicates([row for side in trained.values() for row in side], kept_out, threshold)):
        found = {match[0] for match in matches}
        for name, side in trained.items():
            here = {row["id"] for row in side}
            copies += [{"side": name, "id": one, "of": other, "similarity": score} for one, other, score in matches if one in here]
            trained[name] = [row for row in side if row["id"] not in found]
    return copies
