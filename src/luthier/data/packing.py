"""The order of rows, and best-fit packing of it: pure functions of lengths, seed and epoch."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

LOOKAHEAD = 2048  # documents that wait to be placed


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The documents of one epoch, shuffled."""
    return _shuffled(count, seed, epoch).tolist()


def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def passes(count: int, seed: int, epochs: int | None) -> Iterator[Iterator[int]]:
    """Epoch after epoch; for ever without `epochs`."""
    epoch = 0
    while epochs is None or epoch < epochs:
        yield numbers(_shuffled(count, seed, epoch))
        epoch += 1


def numbers(documents: np.ndarray) -> Iterator[int]:
    """The members of an array, never all of them as Python's numbers."""
    for start in range(0, len(documents), LOOKAHEAD):
        yield from documents[start : start + LOOKAHEAD].tolist()


def best_fit(documents: Iterable[int], lengths: Sequence[int], row_tokens: int) -> Iterator[list[int]]:
    """One pass over documents, in rows; see `best_fit_passes`."""
    return best_fit_passes([documents], lengths, row_tokens)


def best_fit_passes(
    passes: Iterable[Iterable[int]], lengths: Sequence[int], row_tokens: int
) -> Iterator[list[int]]:  # fmt: skip
    """Rows of at most `row_tokens`: documents in their order while they fit, then always the longest that still does.

    Best fit on a buffer of `LOOKAHEAD` documents, as bin packing does it (arXiv:2404.10830), but for the gap only: a
    row made by best fit alone takes the longest documents first, and so learns in order of length. No document of a
    pass is taken while one of the pass before waits: gaps would be filled with the same few documents of many passes.
    """
    coming = iter(passes)
    source: Iterator[int] = iter(())
    waiting: list[tuple[int, int, int]] = []  # (length, arrival, document), sorted
    arrivals: dict[int, tuple[int, int, int]] = {}  # in order of arrival
    arrived = 0

    def fill() -> None:
        nonlocal arrived, source
        while len(waiting) < LOOKAHEAD:
            document = next(source, None)
            if document is None:
                following = None if waiting else next(coming, None)
                if following is None:
                    return
                source = iter(following)
                continue
            entry = (lengths[document], arrived, document)
            bisect.insort(waiting, entry)
            arrivals[arrived] = entry
            arrived += 1

    def first() -> tuple[int, int, int] | None:
        if not arrivals:
            fill()
        return next(iter(arrivals.values()), None)

    while (entry := first()) is not None:
        row, left = [], row_tokens
        while entry is not None:
            waiting.pop(bisect.bisect_left(waiting, entry))
            del arrivals[entry[1]]
            row.append(entry[2])
            left -= entry[0]
            entry = first()
            if entry is not None and entry[0] > left:
                place = bisect.bisect_right(waiting, (left, arrived, -1))
                entry = waiting[place - 1] if place else None
        yield row
        fill()


def one_by_one(documents: Iterable[int]) -> Iterator[list[int]]:
    for document in documents:
        yield [document]


def grouped(documents: Iterable[int], size: int) -> Iterator[list[int]]:
    """Consecutive groups of `size`; the last may be smaller."""
    group: list[int] = []
    for document in documents:
        group.append(document)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def fullness(rows: Iterable[Sequence[int]], lengths: Sequence[int], row_tokens: int) -> float:
    """The share of the rows' slots that hold a token."""
    rows = list(rows)
    return sum(lengths[d] for row in rows for d in row) / max(1, row_tokens * len(rows))
