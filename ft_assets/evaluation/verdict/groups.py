"""Groups of held-out rows: the turns of one chat, the rows of one customer, near copies.

Rows of one group do not count as independent. A mean over them has the variance of a mean over
n / (1 + (m - 1) r) independent rows, for groups of m rows and a within-group correlation r: the
design effect (Kish 1965; for evaluations Miller 2024, arXiv 2411.00640).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Values = np.ndarray
FEW_GROUPS = 10  # the correlation that an interval assumes is at least FEW_GROUPS / groups


@dataclass(frozen=True)
class Groups:
    """The group of each row, as numbers from 0 to `count` - 1."""

    index: Values
    count: int

    @classmethod
    def of(cls, keys: Sequence[str] | None, rows: int) -> "Groups":
        """Return the groups of rows by their keys; without keys each row is a group."""
        if keys is None:
            return cls(np.arange(rows), rows)
        names, index = np.unique(np.asarray(keys, dtype=object).astype(str), return_inverse=True)
        return cls(index, len(names))

    @property
    def sizes(self) -> Values:
        """The number of rows of each group."""
        return np.bincount(self.index, minlength=self.count)

    @property
    def alone(self) -> bool:
        """True if each group is one row."""
        return self.count == len(self.index)

    def sums(self, values: Values) -> Values:
        """Return the sum of each group's values."""
        return np.bincount(self.index, values, self.count)

    def design_effect(self, correlation: float) -> float:
        """Return the factor by which groups of this correlation enlarge the variance of a mean."""
        mean_size = float((self.sizes**2).sum()) / len(self.index)
        return 1 + (mean_size - 1) * correlation

    def correlation(self, values: Values) -> float:
        """Return the within-group correlation in [0, 1]; 1 if all values are equal.

        It is the ratio of the clustered to the independent variance of the mean, solved for r.
        """
        if self.alone or self.count < 2:
            return 0.0 if self.alone else 1.0
        residuals = values - values.mean()
        independent = float((residuals**2).sum()) * len(values) / (len(values) - 1)
        if independent == 0.0:
            return 1.0
        clustered = float((self.sums(residuals) ** 2).sum()) * self.count / (self.count - 1)
        excess = clustered / independent - 1
        return float(np.clip(excess / (self.design_effect(1.0) - 1), 0.0, 1.0))

    def cautious_correlation(self, values: Values) -> float:
        """Return the correlation that an interval assumes.

        Few groups may lack a whole kind of group, which the estimate cannot show. The floor of
        FEW_GROUPS / groups keeps the errors of bench/verdict.py below their limit.
        """
        return max(self.correlation(values), min(1.0, FEW_GROUPS / self.count))
