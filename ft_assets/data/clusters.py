"""Join rows that belong together, so that statistics can count them by cluster."""

from collections.abc import Iterable

from ft_assets.rows.types import TextRow


class Clusters:
    """Disjoint sets of row ids (union-find, Tarjan 1975), at first one for each group."""

    def __init__(self, rows: Iterable[TextRow]) -> None:
        self._parents: dict[str, str] = {}
        first: dict[str, str] = {}
        for row in rows:
            self._parents[row["id"]] = row["id"]
            self.join(row["id"], first.setdefault(row["group"], row["id"]))

    def join(self, one: str, other: str) -> None:
        """Make one cluster of the clusters of two rows."""
        smaller, larger = sorted((self._name(one), self._name(other)))
        self._parents[larger] = smaller

    def names(self) -> dict[str, str]:
        """Return the cluster of each row: the smallest id in it."""
        return {identity: self._name(identity) for identity in self._parents}

    def _name(self, identity: str) -> str:
        while (parent := self._parents[identity]) != identity:
            self._parents[identity] = self._parents[parent]
            identity = parent
        return identity
