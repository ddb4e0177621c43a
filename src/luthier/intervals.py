"""How sure a figure is: bootstrap and Wilson intervals, paired differences, the sign test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
GROUPS = 2_000  # more rows than this are first added up in so many groups
LEVEL = 0.95
UNDEFINED = 0.05  # share of the resamples in which a figure may be undefined and still have an interval

Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """What is said of a set of rows: a function of the sums of each row's statistics.

    A mean has the statistics (value, 1) and is their quotient. A loss has (sum over the row's tokens, their weight):
    rows are what is drawn again, as the tokens of a row are not independent. BLEU has its counts of n-grams.
    """

    statistics: np.ndarray  # [N, S] float64
    of_sums: Callable[[np.ndarray], np.ndarray]  # [R, S] -> [R]
    higher_is_better: bool = True

    @property
    def value(self) -> float | None:
        """None where it is undefined, such as bits per byte of no bytes."""
        return finite(self.of_sums(self.statistics.sum(0, keepdims=True))[0]) if len(self.statistics) else None

    @property
    def rows(self) -> np.ndarray:
        """[N] the figure of each row alone."""
        return self.of_sums(self.statistics)

    def interval(self) -> Interval | None:
        """Percentiles of the bootstrap (Efron 1979); None of less than two rows, which say nothing of their spread."""
        if len(self.statistics) < 2:
            return None
        if self._yes_or_no():
            return wilson(int(self.statistics[:, 0].sum()), len(self.statistics))
        return _percentiles(self.of_sums(resampled(self.statistics)))

    def gain_over(self, base: Figure) -> Interval | None:
        """Of `self - base`, both on the same rows, which are drawn together."""
        assert len(self.statistics) == len(base.statistics), "base and tuned must have answered the same rows"
        if len(self.statistics) < 2:
            return None
        drawn = resampled(np.concatenate([self.statistics, base.statistics], 1))
        width = self.statistics.shape[1]
        with np.errstate(invalid="ignore"):  # what is undefined for both
            return _percentiles(self.of_sums(drawn[:, :width]) - base.of_sums(drawn[:, width:]))

    def wins_and_losses(self, base: Figure) -> tuple[np.ndarray, np.ndarray]:
        """The positions of the rows on which this is better than `base`, and of those on which it is worse."""
        above, below = np.flatnonzero(self.rows > base.rows), np.flatnonzero(self.rows < base.rows)
        return (above, below) if self.higher_is_better else (below, above)

    def _yes_or_no(self) -> bool:
        s = self.statistics
        if s.shape[1] != 2 or self.of_sums is not quotient:
            return False
        return bool(np.isin(s[:, 0], (0, 1)).all() and (s[:, 1] == 1).all())


def quotient(sums: np.ndarray) -> np.ndarray:
    """[R, 2] -> [R]"""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def mean(values: np.ndarray | list[float]) -> Figure:
    data = np.asarray(values, np.float64)
    return Figure(np.stack([data, np.ones_like(data)], 1), quotient)


def finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def resampled(statistics: np.ndarray, seed: int = 0) -> np.ndarray:
    """[R, S] sums over as many rows as there are, drawn with replacement; the same rows for the same N and seed.

    Many rows are first added up in random groups of equal size, whose sums have the variance that theirs have.
    """
    order, counts = _draws(len(statistics), seed)
    if order is not None:
        statistics = np.stack([statistics[part].sum(0) for part in np.array_split(order, GROUPS)])
    return np.concatenate([counts[start : start + 500] @ statistics for start in range(0, RESAMPLES, 500)])


@lru_cache(maxsize=1)
def _draws(n: int, seed: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The order in which rows go into groups, if they do, and how often each of those is drawn [R, n]: the same for all
    figures of the same rows."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(n) if n > GROUPS else None
    n = min(n, GROUPS)
    out = np.empty((RESAMPLES, n), np.uint16)
    for start in range(0, RESAMPLES, 500):
        size = min(500, RESAMPLES - start)
        drawn = rng.integers(0, n, (size, n)) + np.arange(size)[:, None] * n
        out[start : start + size] = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
    return order, out


def _percentiles(values: np.ndarray) -> Interval | None:
    """Few resamples may leave a figure undefined, as a mean over rows of which none was drawn: they are left out."""
    undefined = np.isnan(values)
    if np.isinf(values).any() or undefined.mean() > UNDEFINED:
        return None
    values = values[~undefined]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson(hits: int, n: int) -> Interval:
    """Of a share of n (Wilson 1927): not empty where all or none were right, as the bootstrap's would be."""
    z = 1.959963984540054  # the normal distribution's quantile of 0.975
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == n else centre + half)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value that wins and losses are equally likely; of yes or no, McNemar's exact test (1947)."""
    n, least = wins + losses, min(wins, losses)
    if wins == losses:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(least + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term - n * math.log(2)) for term in logs))
