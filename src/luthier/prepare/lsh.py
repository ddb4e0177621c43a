"""Near duplicates among millions of rows: candidates by sorting the bands of signatures, then compared as they are.

Locality-sensitive hashing, https://doi.org/10.1145/276698.276876. Among millions of rows thousands share a band with a
row by chance: a sketch of some bits turns nearly all of these away, and only what is left is read again and compared.
Nothing is kept for a row but these numbers, and of rows that were left their sets of shingles, in a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from .clusters import Clusters
from .minhash import differing

WINDOW = 32  # rows of a band with the same number that each is compared with, and the first of them
TOGETHER = 1 << 19  # shingles that are compared at a time: what they need fits into a core's cache
REMEMBERED = 1 << 26  # pairs that are not alike: 512 MiB of them

Band = Callable[[int], np.ndarray]  # which -> [N] uint32, of all rows


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
        self.values = np.asarray(np.memmap(self.file, np.uint32, "r")) if self.size.sum() else empty

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


class Banded:
    """The bands and sketches of all rows, and in how many bits sketches of rows that are alike may differ."""

    def __init__(self, band: Band, bands: int, sketches: np.ndarray, differing: int):
        self.band, self.bands, self.sketches, self.differing = band, bands, sketches, differing

    def pairs(self, which: int, pool: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of the rows of `pool` that share a band and are not told apart by their sketches."""
        for a, b in pairs(self.band(which)[pool], pool):
            for part in range(0, len(a), TOGETHER):
                left, right = a[part : part + TOGETHER], b[part : part + TOGETHER]
                near = differing(self.sketches[left], self.sketches[right]) <= self.differing
                if near.any():
                    yield left[near], right[near]


def repeats(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows with values (both uint32 in range) those whose value another has: sorted by value and row; the values."""
    keys = values.astype(np.uint64) << np.uint64(32)
    keys |= rows.astype(np.uint64)
    keys.sort()
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    same = ordered[1:] == ordered[:-1]
    more = np.zeros(len(keys), bool)
    more[1:] |= same
    more[:-1] |= same
    return (keys[more] & np.uint64(0xFFFFFFFF)).astype(np.int64), ordered[more]


def pairs(values: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows of the same value: each with those next before it, by distance, and at last with the first.

    All pairs where no more than `WINDOW` + 1 share it; else so many that work grows with the rows, not their square.
    """
    rows, ordered = repeats(values, rows)
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


def unite_equal(clusters: Clusters, values: np.ndarray) -> None:
    """Rows with the same of the [N] values."""
    order = np.argsort(values, kind="stable")
    same = values[order[1:]] == values[order[:-1]]
    clusters.unite(order[:-1][same], order[1:][same])


def candidates(of: Banded, pool: np.ndarray) -> np.ndarray:
    """Those of the rows of `pool` that may be like another of them, rising."""
    marked = np.zeros(len(of.sketches), bool)
    for which in range(of.bands):
        for a, b in of.pairs(which, pool):
            marked[a] = marked[b] = True
    return np.flatnonzero(marked)


def unite_near(clusters: Clusters, of: Banded, pool: np.ndarray, sets: Sets, threshold: float) -> bool:
    """Rows of `pool` that are at least so similar, whether there were any; each pair is compared by its true sets."""
    any_found = False
    known = np.zeros(0, np.uint64)  # rising: pairs that were compared and are not alike, which other bands have too
    for which in range(of.bands):
        unlike = []
        for a, b in of.pairs(which, pool):
            keys = a.astype(np.uint64) << np.uint64(32) | b.astype(np.uint64)
            todo = (clusters.roots(a) != clusters.roots(b)) & ~_among(keys, known)
            a, b, keys = a[todo], b[todo], keys[todo]
            near = sets.jaccard(a, b, threshold) >= threshold
            unlike.append(keys[~near])
            if near.any():
                any_found = True
                clusters.unite(a[near], b[near])
        if len(known) < REMEMBERED:
            known = np.concatenate([known, *unlike])
            known.sort()
    return any_found


def _among(values: np.ndarray, rising: np.ndarray) -> np.ndarray:
    if not len(rising):
        return np.zeros(len(values), bool)
    return rising[np.minimum(np.searchsorted(rising, values), len(rising) - 1)] == values


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
    clusters: Clusters, of: Banded, pool: np.ndarray, sets: Sets, threshold: float, stays: Callable[[], np.ndarray]
) -> None:
    """Unite what is near until among the rows that stay nothing is: then a second cleaning finds nothing."""
    while unite_near(clusters, of, pool, sets, threshold):
        best = stays()
        pool = pool[best[pool] == pool]
