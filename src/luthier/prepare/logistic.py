"""Logistic regression over bags of words; the loss is convex and the optimiser draws nothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .bag_of_words import BITS, Features


class Vocabulary(NamedTuple):
    """What features count of those that two texts or more have."""

    numbers: np.ndarray  # [2^bits] int32: of a feature; -1 for one that is left out
    idf: np.ndarray  # [D] float32: inverse document frequency


def vocabulary(features: Features, bits: int = BITS) -> Vocabulary:
    """Of the texts that are learnt. What a single text has says nothing of another."""
    rows = len(features.ends) - 1
    frequency = np.bincount(features.ids & ((1 << bits) - 1), minlength=1 << bits)
    kept = frequency > 1
    numbers = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
    return Vocabulary(numbers, (np.log((1 + rows) / (1 + frequency[kept])) + 1).astype(np.float32))


class Matrix:
    """Rows of weighted features [N, D], as they are multiplied from both sides, or from one."""

    def __init__(self, features: Features, words: Vocabulary, both: bool = True):
        rows = len(features.ends) - 1
        ids = words.numbers[features.ids & (len(words.numbers) - 1)]
        here = ids >= 0
        of = np.repeat(np.arange(rows, dtype=np.int32), np.diff(features.ends))[here]
        ids = ids[here]
        values = (1 + np.log(features.times[here].astype(np.float32))) * words.idf[ids]
        length = np.sqrt(np.bincount(of, values.astype(np.float64) ** 2, minlength=rows))
        values = (values / np.maximum(length, 1e-12)[of]).astype(np.float32)
        self.rows, self.width = rows, len(words.idf)
        self.by_row = self._held(of, ids, values, rows)
        if both:
            order = np.argsort(ids, kind="stable")
            self.by_feature = self._held(ids[order], of[order], values[order], self.width)

    @staticmethod
    def _held(lines: np.ndarray, ids: np.ndarray, values: np.ndarray, count: int) -> tuple[Tensor, Tensor, Tensor]:
        starts = np.searchsorted(lines, np.arange(count)).astype(np.int32)
        return torch.from_numpy(ids), torch.from_numpy(starts), torch.from_numpy(values)

    def times(self, weights: Tensor) -> Tensor:
        """[N, K] of weights [D, K]."""
        return self._sums(weights, *self.by_row)

    def back(self, values: Tensor) -> Tensor:
        """[D, K] of values [N, K]: the product with the transposed matrix."""
        return self._sums(values, *self.by_feature)

    @staticmethod
    def _sums(table: Tensor, ids: Tensor, starts: Tensor, values: Tensor) -> Tensor:
        return F.embedding_bag(ids, table, starts, mode="sum", per_sample_weights=values)


class Classifier(NamedTuple):
    """Weights [D, K] and bias [K]."""

    weights: Tensor
    bias: Tensor

    def __call__(self, matrix: Matrix) -> np.ndarray:
        """[N, K] float32 probabilities."""
        with torch.no_grad():
            return (matrix.times(self.weights) + self.bias).softmax(-1).numpy()


def fitted(matrix: Matrix, labels: Tensor, share: Tensor, classes: int, c: float, steps: int) -> Classifier:
    """Multinomial logistic regression on rows that count `share` [N] float32, 0 for not at all.

    The least of the mean cross-entropy and of |weights|^2 / (2 c n), n the sum of shares, as scikit-learn has it with
    sample_weight, by L-BFGS.
    """
    weights = torch.zeros(matrix.width, classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    count = float(share.sum())
    target = F.one_hot(labels, classes).float()
    mask = (share / count)[:, None]
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=steps, history_size=8, tolerance_grad=1e-6, tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    @torch.no_grad()
    def closure() -> Tensor:
        logs = (matrix.times(weights) + bias).log_softmax(-1)
        off = (logs.exp() - target) * mask
        weights.grad = matrix.back(off).add_(weights, alpha=1 / (c * count))
        bias.grad = off.sum(0)
        loss = -(logs * target * mask).sum()
        return loss + (weights * weights).sum() / (2 * c * count)

    optimizer.step(closure)  # type: ignore[arg-type]
    return Classifier(weights.detach(), bias.detach())
