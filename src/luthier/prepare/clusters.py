"""Which rows hang together, from pairs that do: a union-find in one array, for ten million rows."""

from __future__ import annotations

import numpy as np


class Clusters:
    """The root of a cluster is its first row, whatever the order in which pairs came."""

    def __init__(self, count: int):
        self.parent = np.arange(count, dtype=np.int64)  # never after its child

    def roots(self, rows: np.ndarray) -> np.ndarray:
        """The first row of the cluster of each."""
        found = self.parent[rows]
        while not np.array_equal(above := self.parent[found], found):
            found = above
        self.parent[rows] = found
        return found

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Each row of `a` with that of `b` at its place."""
        while True:
            a, b = self.roots(a), self.roots(b)
            apart = a != b
            if not apart.any():
                return
            a, b = np.minimum(a[apart], b[apart]), np.maximum(a[apart], b[apart])
            np.minimum.at(self.parent, b, a)  # of two the lower; the other comes round again

    def all(self) -> np.ndarray:
        """[N]: the first row of each row's cluster."""
        return self.roots(np.arange(len(self.parent)))
