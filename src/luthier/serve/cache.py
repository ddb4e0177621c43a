"""The cache of all requests: stretches that grow, beginnings that are used again, and a bound on it all."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from .attention import Store
from .pool import Pool, Region
from .row import Row

USEFUL = 16  # tokens that a beginning must have to be copied
GROWTH = 64  # tokens that a stretch grows by, at least


@dataclass(eq=False)
class Kept:
    """What a request that has ended left in the cache."""

    region: Region
    names: frozenset[str]
    tokens: bytes


class Cache:
    """Stretches of one pool, for rows that are running and, as long as there is room, of those that have ended."""

    def __init__(self, size: int, keep: int = 64):
        self.pool, self.store, self.keep = Pool(size), Store(size), keep
        self.idle: OrderedDict[int, Kept] = OrderedDict()  # the longest unused first
        self.reused = 0

    @property
    def used(self) -> int:
        return sum(region.size for region in self.pool.regions) - self.idle_tokens

    @property
    def idle_tokens(self) -> int:
        return sum(kept.region.size for kept in self.idle.values())

    # ------------------------------------------------------------------ a row comes and goes
    def admit(self, row: Row, running: Iterable[Row]) -> bool:
        """Find room for a row's tokens and copy what is there already of its beginning; False if there is no room."""
        packed = array("i", row.tokens).tobytes()
        limit = len(row.tokens) - 1  # one must be run, for what comes next
        best, count = None, 0
        for key, kept in self.idle.items():
            if kept.names == row.names and (n := min(_common(kept.tokens, packed), limit)) > count:
                best, count = key, n
        source, ahead = None, max(count, USEFUL - 1)
        for other in running:
            if other.names == row.names and other.place is not None:
                n = min(_common(array("i", other.tokens).tobytes(), packed), limit)
                if n > ahead:
                    source, ahead = other, n
        size = min(row.most, len(row.tokens) + max(GROWTH, len(row.tokens) // 4))
        if source is None and best is not None and count >= USEFUL:
            kept = self.idle.pop(best)
            # Where it goes on, nothing is copied.
            if count * 4 == len(kept.tokens) and self.pool.resize(kept.region, max(size, count)):
                row.place, row.computed = kept.region, count
                self._reuse(row, count)
                return True
            self.idle[best] = kept
            row.place = self._take(size, keep=best) or self._take(len(row.tokens), keep=best)
            if row.place is not None:
                self.store.move(kept.region.start, row.place.start, count)
                row.computed = count
                self._reuse(row, count)
                return True
            row.place, row.computed = self.idle.pop(best).region, count  # nothing else is left of what has ended
            if self.room(row, len(row.tokens)):
                self._reuse(row, count)
                return True
            self.pool.give(row.place)
            row.place, row.computed = None, 0
            return False
        row.place = self._take(size) or self._take(min(row.most, len(row.tokens)))
        if row.place is not None and source is not None:
            row.source, row.shared = source, ahead
        return row.place is not None

    def follow(self, row: Row) -> bool:
        """Whether a row can be run: what another one computes for it is copied when it is there."""
        source = row.source
        if source is None:
            return True
        if source.place is None:  # it has gone
            row.source = None
            return True
        if source.computed < row.shared:
            return False
        self.store.move(source.place.start, row.place.start, row.shared)
        row.computed, row.source = row.shared, None
        self._reuse(row, row.shared)
        return True

    def room(self, row: Row, tokens: int) -> bool:
        """Whether a row's stretch holds so many tokens, grown where it has to be."""
        if row.place.size >= tokens:
            return True
        assert tokens <= row.most
        wanted = min(row.most, tokens + max(GROWTH, tokens // 2))
        if self.pool.resize(row.place, wanted) or self.pool.resize(row.place, tokens):
            return True
        if moved := self._take(wanted) or self._take(tokens):
            self.store.move(row.place.start, moved.start, row.computed)
            self.pool.give(row.place)
            row.place = moved
            return True
        if self.pool.free < tokens - row.place.size:
            return False
        self._close_up(row.place)
        grown = self.pool.resize(row.place, tokens)
        assert grown
        return True

    def release(self, row: Row, keep: bool = True) -> None:
        """A row has ended, or waits again; what it computed may be of use to others."""
        region, row.place, row.source = row.place, None, None
        if region is None:
            return
        if not keep or row.computed < USEFUL or self.keep == 0:
            self.pool.give(region)
        else:
            self.pool.resize(region, row.computed)
            packed = array("i", row.tokens[: row.computed]).tobytes()
            for key in [k for k, old in self.idle.items() if old.names == row.names and packed.startswith(old.tokens)]:
                self.pool.give(self.idle.pop(key).region)
            self.idle[id(region)] = Kept(region, row.names, packed)
            while len(self.idle) > self.keep:
                self._forget()
        row.computed = 0

    def clear(self) -> None:
        while self._forget():
            pass

    # ------------------------------------------------------------------ room
    def _reuse(self, row: Row, count: int) -> None:
        self.reused += count
        row.stream.reused = count

    def _take(self, size: int, keep: int | None = None) -> Region | None:
        """Room for `size` tokens, where need be of what has ended (but not of `keep`)."""
        while True:
            if region := self.pool.take(size):
                return region
            if self.pool.free >= size:
                self._close_up()
                continue
            if not self._forget(keep):
                return None

    def _forget(self, keep: int | None = None) -> bool:
        """What has ended and was unused for the longest."""
        key = next((k for k in self.idle if k != keep), None)
        if key is None:
            return False
        self.pool.give(self.idle.pop(key).region)
        return True

    def _close_up(self, last: Region | None = None) -> None:
        self.store.rearrange(self.pool.close_up(last))


def _common(one: bytes, other: bytes) -> int:
    """How many numbers of 4 bytes two arrays begin with alike."""
    low, high = 0, min(len(one), len(other)) // 4
    if one[: 4 * high] == other[: 4 * high]:
        return high
    while high - low > 1:  # alike up to `low`, not up to `high`
        middle = (low + high) // 2
        if one[4 * low : 4 * middle] == other[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle
    return low
