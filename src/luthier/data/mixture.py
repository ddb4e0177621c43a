"""Several sources by weight: which source each draw takes, evenly over any stretch, and which of its documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np

WINDOW = 1 << 16  # draws that are laid out at a time


def shares_of(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


def turns(shares: Sequence[float], window: int = WINDOW) -> Iterator[np.ndarray]:
    """The source of each draw, for ever, in pieces: the k-th draw of a source with share p stands at (k + 1/2) / p.

    So p = 1/2, 1/4, 1/4 gives 0 1 2 0, 0 1 2 0, ...: after any number of draws each source is within one of its
    share, for two sources, and within half their number plus a half for more.
    """
    taken = [0] * len(shares)
    end = 0
    while True:
        end += window
        times, owners = [], []
        for source, share in enumerate(shares):
            at = (taken[source] + np.arange(int(window * share) + 2) + 0.5) / share
            at = at[at < end]
            taken[source] += len(at)
            times.append(at)
            owners.append(np.full(len(at), source, np.int32))
        yield np.concatenate(owners)[np.argsort(np.concatenate(times), kind="stable")]


def taken_before(share: float, time: int) -> int:
    """How many draws of a source stand before `time`: the k with (k + 1/2) / share < time."""
    k = max(0, int(time * share) - 2)
    while (k + 0.5) / share < time:
        k += 1
    return k


def merged(groups: Sequence[np.ndarray]) -> np.ndarray:
    """All members of the groups, each group in its order and spread evenly over the whole."""
    times = [(np.arange(len(group)) + 0.5) / max(1, len(group)) for group in groups]
    return np.concatenate(groups)[np.argsort(np.concatenate(times), kind="stable")]


def epochs_of(
    sizes: Sequence[int], weights: Sequence[float], seed: int, epochs: int | None
) -> Iterator[Iterator[int]]:  # fmt: skip
    """Documents of the sources, laid end to end, in the order in which they are learnt; an iterator for each epoch.

    Each source is shuffled anew for each of its own passes and begins the next one when it runs out. An epoch of the
    whole is as many draws as the sources have documents together; without `epochs` there is no end.
    """
    endless = _endless(sizes, weights, seed)
    return (islice(endless, sum(sizes)) for _ in (count() if epochs is None else range(epochs)))


def _endless(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Iterator[int]:
    starts = np.cumsum([0, *sizes])
    passes = [_Passes(size, seed, source) for source, size in enumerate(sizes)]
    for owners in turns(shares_of(weights)):
        drawn = np.empty(len(owners), np.int64)
        for source, documents in enumerate(passes):
            places = np.flatnonzero(owners == source)
            drawn[places] = starts[source] + documents.take(len(places))
        yield from drawn.tolist()


class _Passes:
    """The documents of one source, pass after pass."""

    def __init__(self, size: int, seed: int, source: int):
        self.size, self.seed, self.source = size, seed, source
        self.passed, self.left = 0, np.zeros(0, np.int64)

    def take(self, wanted: int) -> np.ndarray:
        parts = []
        while wanted > 0:
            if not len(self.left):
                self.left = np.random.default_rng([self.seed, self.passed, self.source + 1]).permutation(self.size)
                self.passed += 1
            parts.append(self.left[:wanted])
            self.left = self.left[wanted:]
            wanted -= len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
