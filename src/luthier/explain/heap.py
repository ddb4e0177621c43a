"""How far glibc's heap grows: blocks of a step, placed as malloc places them, with the gaps that are left between them.

PyTorch asks for blocks aligned to 64 bytes. glibc looks for a free chunk that is larger by the alignment, so that a
block that was freed cannot hold the next one of the same size unless a neighbour is free, too: on a CPU the gaps can
come to as much as the activations. `parallel/ranks.py` asks malloc to keep what was freed, and to map only blocks from
32 MiB on apart.
"""

from __future__ import annotations

import bisect

MAPPED = 32 << 20  # bytes: from here on, a block is mapped by itself and given back when it is freed
ALIGNMENT, HEADER, LEAST = 64, 16, 32
CACHED = 1032  # bytes: malloc keeps shorter pieces apart for small objects, instead of joining them to free neighbours
TAKEN = 3  # one in so many of them is taken by such an object; fitted to what docs/memory.md measures


class Heap:
    """Best fit with coalescing, aligned requests cut at both ends; never trimmed."""

    def __init__(self) -> None:
        self.extent = self.mapped = self.peak = self.pieces = 0
        self.taken: dict[int, tuple[int, int]] = {}  # key -> start, size; start -1 where mapped
        self.sizes: list[tuple[int, int]] = []  # free chunks: (size, start), sorted
        self.starts: dict[int, int] = {}  # free chunks: start -> size
        self.stops: dict[int, int] = {}  # end -> start

    def take(self, key: int, size: int) -> None:
        if size + HEADER >= MAPPED:
            self.taken[key] = (-1, size)
            self.mapped += size
        else:
            wanted = max(LEAST, (size + HEADER + 15) // 16 * 16)
            self.taken[key] = (self._place(wanted), wanted)
        self.peak = max(self.peak, self.extent + self.mapped)

    def give(self, key: int) -> None:
        start, size = self.taken.pop(key)
        if start < 0:
            self.mapped -= size
        else:
            self._free(start, size)

    def _place(self, wanted: int) -> int:
        padded = wanted + ALIGNMENT + LEAST
        i = bisect.bisect_left(self.sizes, (padded, -1))
        if i < len(self.sizes):
            size, start = self.sizes[i]
            self._forget(start)
        else:
            start, size = self.extent, padded
            if self.extent in self.stops:  # the last free chunk grows
                start = self.stops[self.extent]
                self._forget(start)
                size = padded
            self.extent = start + size
        lead = -(start + HEADER) % ALIGNMENT
        if 0 < lead < LEAST:
            lead += ALIGNMENT
        tail = size - lead - wanted
        for first, piece in ((start, lead), (start + lead + wanted, tail)):
            self.pieces += 0 < piece <= CACHED
            if piece > CACHED or (piece and self.pieces % TAKEN):
                self._free(first, piece)
        return start + lead

    def _free(self, start: int, size: int) -> None:
        if start in self.stops:
            before = self.stops[start]
            size += self.starts[before]
            self._forget(before)
            start = before
        if start + size in self.starts:
            after = start + size
            size += self.starts[after]
            self._forget(after)
        self.starts[start], self.stops[start + size] = size, start
        bisect.insort(self.sizes, (size, start))

    def _forget(self, start: int) -> None:
        size = self.starts.pop(start)
        del self.stops[start + size]
        self.sizes.pop(bisect.bisect_left(self.sizes, (size, start)))
