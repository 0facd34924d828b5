"""Find the pairs on which annotators disagree, and keep the answer that most of them prefer.

Rows with the same prompt and the same two answers are the votes of annotators.
"""

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction


class Votes:
    """Counts the rows of each pair, by id. A pair and its opposite have the answers exchanged."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._opposites: dict[str, str] = {}

    def add(self, pair: Mapping[str, object]) -> None:
        """Count a row of `preference`, which notes the id of its opposite."""
        identity, opposite = str(pair["id"]), str(pair["opposite"])
        self._rows[identity] += 1
        if opposite in self._rows:
            self._opposites[identity] = opposite
            self._opposites[opposite] = identity

    def lost(self, min_agreement: float) -> dict[str, str]:
        """Return {id: reason} of the pairs to leave out.

        A pair stays if more than half of the votes are for it, and at least `min_agreement`.
        """
        reasons: dict[str, str] = {}
        for identity, opposite in self._opposites.items():
            own, others = self._rows[identity], self._rows[opposite]
            share = Fraction(own, own + others)
            if share <= Fraction(1, 2) or share < min_agreement:
                reasons[identity] = (
                    f"annotators disagree: {own} of {own + others} prefer this answer "
                    f"(data.min_agreement: {min_agreement})"
                )
        return reasons
