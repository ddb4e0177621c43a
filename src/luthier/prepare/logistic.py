"""Logistic regression over bags of words, and what it says of rows that it has not learnt (cross-validation).

The loss is convex and the optimiser draws nothing, so what it says follows from the rows and the drawn folds.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .bag_of_words import BITS, Features


class Matrix:
    """Rows of weighted features [N, D], as they are multiplied from both sides."""

    def __init__(self, features: Features, bits: int = BITS):
        rows = len(features.ends) - 1
        ids = features.ids & ((1 << bits) - 1)
        of = np.repeat(np.arange(rows, dtype=np.int32), np.diff(features.ends))
        frequency = np.bincount(ids, minlength=1 << bits)
        kept = frequency > 1  # what a single text has says nothing of another
        number = np.cumsum(kept) - 1
        here = kept[ids]
        ids, of, times = number[ids[here]].astype(np.int32), of[here], features.times[here]
        idf = np.log((1 + rows) / (1 + frequency[kept])) + 1
        values = (1 + np.log(times)) * idf[ids]
        length = np.sqrt(np.bincount(of, values**2, minlength=rows))
        values = (values / np.maximum(length[of], 1e-12)).astype(np.float32)
        self.rows, self.width = rows, int(kept.sum())
        self.by_row = self._held(of, ids, values, rows)
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


def fitted(matrix: Matrix, labels: Tensor, share: Tensor, classes: int, c: float, steps: int) -> tuple[Tensor, Tensor]:
    """Weights [D, K] and bias [K] of multinomial logistic regression on rows that count `share` [N], 0 for not at all.

    The least of the mean cross-entropy and of |weights|^2 / (2 c n), n the sum of shares, as scikit-learn has it with
    sample_weight, by L-BFGS.
    """
    weights = torch.zeros(matrix.width, classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    count = float(share.sum())
    target = F.one_hot(labels, classes).float()
    mask = (share.float() / count)[:, None]
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
    return weights.detach(), bias.detach()


def folds_of(labels: np.ndarray, folds: int, seed: int, alike: np.ndarray | None = None) -> np.ndarray:
    """[N] the fold of each row: rows of each label are drawn over all folds evenly, those that are `alike` [N] (rows of
    one number) into one, so that no row is told of by its own copy."""
    if alike is not None:
        _, first, of = np.unique(alike, return_index=True, return_inverse=True)
        return folds_of(labels[first], folds, seed)[of]
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    made = np.empty(len(labels), np.int64)
    made[order] = np.arange(len(labels)) % folds
    return made


def held_out(
    matrix: Matrix, labels: np.ndarray, right: np.ndarray, classes: int, folds: int, seed: int, c: float, steps: int,
    alike: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """[N, K] float32 probabilities, each row's by a classifier of the other folds' rows, of those that are `right`.

    Rows that are `alike` count together as much as one.
    """
    fold, wanted = folds_of(labels, folds, seed, alike), torch.from_numpy(labels)
    share = np.ones(len(labels), np.float32)
    if alike is not None:
        _, of, times = np.unique(alike, return_inverse=True, return_counts=True)
        share = (1 / times[of]).astype(np.float32)
    made = np.empty((len(labels), classes), np.float32)
    for number in range(folds):
        out = fold == number
        weights, bias = fitted(matrix, wanted, torch.from_numpy(share * (right & ~out)), classes, c, steps)
        with torch.no_grad():
            made[out] = (matrix.times(weights) + bias).softmax(-1).numpy()[out]
    return made
