"""Near duplicates among millions of rows: candidates by sorting the bands of signatures, then compared as they are.

Locality-sensitive hashing, https://doi.org/10.1145/276698.276876. Nothing is kept for a row but a few numbers, and of
rows that share a band with another, their set of shingles in a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from .clusters import Clusters

WINDOW = 32  # rows of a band with the same number that each is compared with, and the first of them
TOGETHER = 1 << 21  # shingles that are compared at a time

Band = Callable[[int], np.ndarray]  # which -> [N] uint64, of all rows


class Sets:
    """Sets of shingles of some rows, in a file without a name: added in a `with`, compared after it."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows  # [C] int64, rising: which rows have a set
        self.file = tempfile.TemporaryFile()
        self.sizes: list[np.ndarray] = []

    def add(self, values: np.ndarray, sizes: np.ndarray) -> None:
        """The sets of the next rows, end to end, each rising and without repetition."""
        self.file.write(np.ascontiguousarray(values, np.uint32).data)
        self.sizes.append(sizes)

    def __enter__(self) -> Sets:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._map()
        self.file.close()

    def _map(self) -> None:
        self.file.flush()
        self.size = np.concatenate(self.sizes) if self.sizes else np.zeros(0, np.int64)
        assert len(self.size) == len(self.rows), "a row changed between two readings"
        self.start = np.cumsum(self.size) - self.size
        empty = np.zeros(0, np.uint32)
        self.values = np.memmap(self.file, np.uint32, "r") if self.size.sum() else empty

    def jaccard(self, a: np.ndarray, b: np.ndarray, least: float = 0.0) -> np.ndarray:
        """[P] float: shared shingles of two rows over all of both; 0 where sizes alone say that it is below `least`."""
        a, b = np.searchsorted(self.rows, a), np.searchsorted(self.rows, b)
        made = np.zeros(len(a))
        small, large = np.minimum(self.size[a], self.size[b]), np.maximum(self.size[a], self.size[b])
        todo = np.flatnonzero(small >= least * large)
        ends = np.cumsum(self.size[a[todo]] + self.size[b[todo]])
        cuts = np.searchsorted(ends, np.arange(0, ends[-1] if len(ends) else 0, TOGETHER), side="left")
        for part in np.split(todo, np.unique(cuts)):
            if len(part):
                made[part] = self._jaccard(a[part], b[part])
        return made

    def _jaccard(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        both = np.concatenate([self._keyed(a), self._keyed(b)])
        both.sort()
        shared = both[1:][both[1:] == both[:-1]] >> np.uint64(32)
        common = np.bincount(shared.astype(np.int64), minlength=len(a))
        return common / (self.size[a] + self.size[b] - common)

    def _keyed(self, which: np.ndarray) -> np.ndarray:
        """The sets end to end, each value below the number of its pair."""
        size = self.size[which]
        begins = np.cumsum(size) - size
        where = np.arange(int(size.sum())) + np.repeat(self.start[which] - begins, size)
        keys = np.repeat(np.arange(len(which), dtype=np.uint64) << np.uint64(32), size)
        keys |= self.values[where]
        return keys


def repeats(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of [N] values: places of those that are there more than once, equal ones together and rising; their values."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    same = ordered[1:] == ordered[:-1]
    more = np.zeros(len(order), bool)
    more[1:] |= same
    more[:-1] |= same
    return order[more], ordered[more]


def unite_equal(clusters: Clusters, rows: np.ndarray, values: np.ndarray) -> None:
    """Rows with the same value."""
    places, ordered = repeats(values)
    same = ordered[1:] == ordered[:-1]
    clusters.unite(rows[places[:-1][same]], rows[places[1:][same]])


def candidates(band: Band, bands: int, pool: np.ndarray) -> np.ndarray:
    """Those of the rows of `pool` that share a band with another of them, rising."""
    marked = np.zeros(len(pool), bool)
    for i in range(bands):
        marked[repeats(band(i)[pool])[0]] = True
    return pool[marked]


def pairs(values: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows of the same value: each with those next before it, by distance, and at last with the first.

    All pairs where no more than `WINDOW` + 1 share it; else so many that work grows with the rows, not their square.
    """
    places, ordered = repeats(values)
    rows = rows[places]
    for distance in range(1, min(WINDOW, len(rows) - 1) + 1):
        same = ordered[distance:] == ordered[:-distance]
        if not same.any():
            return
        yield rows[:-distance][same], rows[distance:][same]
    new = np.ones(len(rows), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))
    far = np.arange(len(rows)) - first > WINDOW
    yield rows[first[far]], rows[far]


def unite_near(clusters: Clusters, band: Band, bands: int, pool: np.ndarray, sets: Sets, threshold: float) -> bool:
    """Rows of `pool` that are at least so similar, whether there were any; each pair is compared by its true sets."""
    any_found = False
    for i in range(bands):
        for a, b in pairs(band(i)[pool], pool):
            apart = clusters.roots(a) != clusters.roots(b)
            a, b = a[apart], b[apart]
            near = sets.jaccard(a, b, threshold) >= threshold
            if near.any():
                any_found = True
                clusters.unite(a[near], b[near])
    return any_found


def kept(clusters: Clusters, sizes: np.ndarray, longest: bool) -> np.ndarray:
    """[N]: of each row's cluster the row that stays: the first, or the first of the longest."""
    root = clusters.all()
    if not longest:
        return root
    order = np.lexsort((-sizes.astype(np.int64), root))  # stable: of equals the first
    new = np.ones(len(order), bool)
    new[1:] = root[order][1:] != root[order][:-1]
    best = np.empty(len(root), np.int64)
    best[root[order][new]] = order[new]
    return best[root]


def clustered(
    clusters: Clusters, band: Band, bands: int, pool: np.ndarray, sets: Sets, threshold: float,
    stays: Callable[[], np.ndarray],
) -> None:  # fmt: skip
    """Unite what is near until among the rows that stay nothing is: then a second cleaning finds nothing."""
    while unite_near(clusters, band, bands, pool, sets, threshold):
        best = stays()
        pool = pool[best[pool] == pool]
