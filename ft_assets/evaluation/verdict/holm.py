"""Holm's correction for several tests. Not in statistics.py: a verdict that is read again must not
import scipy and statsmodels, which takes longer than the rest of a run with nothing to do."""


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p-values, which bound the chance of one or more false findings.

    The i-th smallest of m p-values is multiplied by m - i, counted from zero, and is at least as
    large as the one before it (Holm 1979, Scandinavian Journal of Statistics 6:65).
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
