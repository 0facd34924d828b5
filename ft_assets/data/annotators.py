"""Find the pairs on which annotators disagree, and keep the answer that most of them prefer.

Rows with the same prompt and the same two answers are the votes of annotators.
"""

from collections.abc import Mapping
from fractions import Fraction


class Votes:
    """Counts the rows of each pair, by id, under the key of its prompt and its two answers."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}  # most pairs have one row: a dictionary each costs memory
        self._votes: dict[str, dict[str, int]] = {}

    def add(self, pair: Mapping[str, object]) -> None:
        """Count a row of `preference`, which notes the key `answers`."""
        key, identity = str(pair["answers"]), str(pair["id"])
        first = self._first.setdefault(key, "")
        if not first:
            self._first[key] = identity
            return
        counts = self._votes.setdefault(key, {first: 1})
        counts[identity] = counts.get(identity, 0) + 1

    def lost(self, min_agreement: float) -> dict[str, str]:
        """Return {id: reason} of the pairs to leave out.

        A pair stays if more than half of the votes are for it, and at least `min_agreement`.
        """
        reasons: dict[str, str] = {}
        for counts in self._votes.values():
            if len(counts) == 1:  # they agree
                continue
            total = sum(counts.values())
            for identity, own in counts.items():
                share = Fraction(own, total)
                if share <= Fraction(1, 2) or share < min_agreement:
                    reasons[identity] = (
                        f"annotators disagree: {own} of {total} prefer this answer "
                        f"(data.min_agreement: {min_agreement})"
                    )
        return reasons
