"""What light classifiers say of rows that they have not learnt, where labels may be wrong: cross-validation, twice.

The rows that a classifier learns are first looked at by others, each of which has learnt a part of the same rows only:
those whose label looks wrong are left out. So nothing that a row's prediction follows from has seen the row's label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from . import noise_model
from .bag_of_words import BITS, Features, chosen
from .logistic import Classifier, Matrix, Vocabulary, fitted, vocabulary

AT_LEAST = 100  # rows of a class that are learnt, of which there are more, where only some rows are
_TOGETHER = 8192  # rows that are predicted at a time
WRONG = 0.5  # the probability from which on a row is not learnt from


class Learning(NamedTuple):
    """How it is learnt: the settings of the check `label_noise`."""

    folds: int
    seed: int
    c: float
    iterations: int
    prune: bool
    most: int


def folds_of(labels: np.ndarray, folds: int, seed: int, alike: np.ndarray) -> np.ndarray:
    """[N] the fold of each row: rows of each label are drawn over all folds evenly, those that are `alike` [N] (rows of
    one number) into one, so that no row is told of by its own copy."""
    _, first, of = np.unique(alike, return_index=True, return_inverse=True)
    labels = labels[first]
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    made = np.empty(len(labels), np.int64)
    made[order] = np.arange(len(labels)) % folds
    return made[of]


def drawn(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Rows, rising, that classifiers see of all: about `most`, of each label as large a share, but few of none."""
    if len(labels) <= most:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # among rows of its label
    wanted = np.maximum(np.ceil(counts * (most / len(labels))), AT_LEAST)
    return np.sort(order[place < np.repeat(wanted, counts)])


def held_out(
    features: Sequence[Features], labels: np.ndarray, alike: np.ndarray, classes: int, how: Learning
) -> np.ndarray:
    """[N, K] float32 probabilities of rows, given in pieces. Rows that are `alike` count together as much as one."""
    fold = folds_of(labels, how.folds, how.seed, alike)
    rows = drawn(labels, how.most * how.folds // (how.folds - 1), how.seed)
    bits = min(BITS, max(12, 24 - int(np.ceil(np.log2(classes)))))  # 2^24 weights: 64 MiB, some twenty times
    learnt = _joined([chosen(piece, inside) for piece, inside in _by_piece(features, rows)])
    words = vocabulary(learnt, bits)
    made = [*_classifiers(Matrix(learnt, words), labels[rows], alike[rows], fold[rows], classes, how)]
    return _predicted(features, words, fold, made, classes)


def _classifiers(
    matrix: Matrix, labels: np.ndarray, alike: np.ndarray, fold: np.ndarray, classes: int, how: Learning
) -> Iterator[Classifier]:
    """Of each fold the one that learns the rows of all others."""
    _, of, times = np.unique(alike, return_inverse=True, return_counts=True)
    share, wanted = (1 / times[of]).astype(np.float32), torch.from_numpy(labels)

    def learnt(which: np.ndarray) -> Classifier:
        return fitted(matrix, wanted, torch.from_numpy(share * which), classes, how.c, how.iterations)

    inner = folds_of(labels, max(2, how.folds - 1), how.seed + 1, alike)
    for number in range(how.folds):
        here = fold != number
        yield learnt(here & ~_looks_wrong(matrix, labels, here, inner, learnt) if how.prune else here)


def _looks_wrong(
    matrix: Matrix, labels: np.ndarray, here: np.ndarray, inner: np.ndarray, learnt: Callable[[np.ndarray], Classifier]
) -> np.ndarray:
    """[N] bool: of the rows `here` those whose label is likelier wrong than right; of no label more than half."""
    probabilities: np.ndarray | None = None
    for part in range(inner.max() + 1):
        told = learnt(here & (inner != part))(matrix)
        probabilities = told if probabilities is None else probabilities
        probabilities[inner == part] = told[inner == part]
    assert probabilities is not None
    model = noise_model.fitted(labels[here], probabilities[here])
    doubt = np.zeros(len(labels))
    doubt[here] = noise_model.wrong(labels[here], probabilities[here], model)[0]
    made = doubt > WRONG
    for label in np.unique(labels[made]):
        rows = np.flatnonzero(here & (labels == label))
        made[rows[np.argsort(doubt[rows], kind="stable")[: -(-len(rows) // 2)]]] = False
    return made


def _predicted(
    features: Sequence[Features], words: Vocabulary, fold: np.ndarray, made: Sequence[Classifier], classes: int
) -> np.ndarray:
    probabilities = np.empty((len(fold), classes), np.float32)
    for piece, inside, first in _pieces(features):
        for number, classifier in enumerate(made):
            rows = inside[fold[first : first + len(inside)] == number]
            for at in range(0, len(rows), _TOGETHER):
                part = rows[at : at + _TOGETHER]
                probabilities[first + part] = classifier(Matrix(chosen(piece, part), words, both=False))
    return probabilities


def _pieces(features: Sequence[Features]) -> Iterator[tuple[Features, np.ndarray, int]]:
    """(a piece, the numbers of its rows in it, the number of its first row in the whole)."""
    first = 0
    for piece in features:
        yield piece, np.arange(len(piece.ends) - 1), first
        first += len(piece.ends) - 1


def _by_piece(features: Sequence[Features], rows: np.ndarray) -> Iterator[tuple[Features, np.ndarray]]:
    for piece, inside, first in _pieces(features):
        low, high = np.searchsorted(rows, [first, first + len(inside)])
        yield piece, rows[low:high] - first


def _joined(parts: Sequence[Features]) -> Features:
    lengths = np.concatenate([np.diff(part.ends) for part in parts])
    return Features(
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.times for part in parts]),
    )
