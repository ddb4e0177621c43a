"""Places of a cache: who has which stretch of them, and what is free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Region:
    """`size` places one after another, from `start` on."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Pool:
    """Stretches of `size` places; what is given back joins what is free beside it."""

    def __init__(self, size: int):
        self.size = size
        self.regions: set[Region] = set()
        self._free: list[tuple[int, int]] = [(0, size)] if size else []  # (start, end), in order

    @property
    def free(self) -> int:
        return sum(end - start for start, end in self._free)

    def take(self, size: int) -> Region | None:
        """The smallest stretch that is large enough; None where there is none."""
        assert size > 0
        fitting = [(end - start, i) for i, (start, end) in enumerate(self._free) if end - start >= size]
        if not fitting:
            return None
        _, i = min(fitting)
        start, end = self._free[i]
        self._free[i : i + 1] = [(start + size, end)] if end - start > size else []
        made = Region(start, size)
        self.regions.add(made)
        return made

    def give(self, region: Region) -> None:
        self.regions.remove(region)
        self._release(region.start, region.end)

    def resize(self, region: Region, size: int) -> bool:
        """Make it larger where what follows is free, or smaller; False leaves it as it is."""
        if size <= region.size:
            self._release(region.start + size, region.end)
            region.size = size
            return True
        for i, (start, end) in enumerate(self._free):
            if start == region.end and end - region.start >= size:
                at = region.start + size
                self._free[i : i + 1] = [(at, end)] if end > at else []
                region.size = size
                return True
        return False

    def close_up(self, last: Region | None = None) -> list[tuple[int, int, int]]:
        """Move all regions to the front, `last` behind the others, so that all that is free is in one piece.

        Returns the moves (from, to, size), to be made one after another: what is moved may be where others come to.
        """
        ordered = sorted(self.regions, key=lambda region: (region is last, region.start))
        moves, at = [], 0
        for region in ordered:
            if region.start != at:
                moves.append((region.start, at, region.size))
            region.start = at
            at += region.size
        self._free = [(at, self.size)] if at < self.size else []
        return moves

    def _release(self, start: int, end: int) -> None:
        if start == end:
            return
        spans = sorted([*self._free, (start, end)])
        joined = [spans[0]]
        for a, b in spans[1:]:
            assert a >= joined[-1][1], "given back twice"
            if a == joined[-1][1]:
                joined[-1] = (joined[-1][0], b)
            else:
                joined.append((a, b))
        self._free = joined
