"""Confident learning (Northcutt et al., arXiv:1911.00068): which labels are wrong, from probabilities of a classifier.

The probabilities of a row must come from a classifier that has not learnt the row. A class's threshold is the mean
probability that rows labelled so are given of it; a row counts as one of the class that is likeliest among those whose
threshold it reaches. Counts by label and by that class, brought to the labels' own counts, say how many labels of each
class are wrong and for which other; the rows that are the least like their label are these.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

FilterBy = Literal["prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given"]
_ROUNDING = 1e-6  # a probability that equals its threshold reaches it, however it was summed


class Joint(NamedTuple):
    """How labels and what rows really are go together."""

    thresholds: np.ndarray  # [K]; infinite for a class that no row is labelled with
    counts: np.ndarray  # [K, K] int64: rows labelled i that are confidently of class j
    estimated: np.ndarray  # [K, K] int64: the same, of all rows: a line adds up to the rows that are labelled i
    classes: np.ndarray  # [N] int64: the class that each row is confidently of; -1 for none

    @property
    def noise(self) -> float:
        """The share of labels that are estimated to be wrong."""
        total = int(self.estimated.sum())
        return 1 - float(np.trace(self.estimated)) / total if total else 0.0


def joint(labels: np.ndarray, probabilities: np.ndarray) -> Joint:
    """labels [N] in 0..K-1; probabilities [N, K], each of a classifier that has not seen the row."""
    count = probabilities.shape[1]
    rows = np.bincount(labels, minlength=count)
    own = probabilities[np.arange(len(labels)), labels]
    sums = np.bincount(labels, weights=own, minlength=count)
    thresholds = np.divide(sums, rows, out=np.full(count, np.inf), where=rows > 0)
    reached = probabilities >= thresholds - _ROUNDING
    likeliest = np.where(reached, probabilities, -1.0).argmax(axis=1)
    classes = np.where(reached.any(axis=1), likeliest, -1)
    sure = classes >= 0
    counts = np.zeros((count, count), np.int64)
    np.add.at(counts, (labels[sure], classes[sure]), 1)
    return Joint(thresholds, counts, _brought_to(counts, rows), classes)


def _brought_to(counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The counts scaled so that each line adds up to the rows of its label, in whole numbers (largest remainders).

    A label that no row is confidently of is held to be right once: nothing else is known of it.
    """
    counts = counts.astype(np.float64)
    diagonal = np.arange(len(counts))
    counts[diagonal, diagonal] = np.maximum(counts[diagonal, diagonal], 1.0)
    exact = counts / counts.sum(axis=1, keepdims=True) * rows[:, None]
    whole = np.floor(exact + 1e-9).astype(np.int64)
    for line, lacking in enumerate(rows - whole.sum(axis=1)):
        order = np.argsort(-(exact[line] - whole[line]), kind="stable")
        whole[line, order[:lacking]] += 1
    return whole


def issues(labels: np.ndarray, probabilities: np.ndarray, found: Joint, filter_by: FilterBy) -> np.ndarray:
    """[N] bool: rows whose label is held to be wrong. One whose label is the likeliest class is never."""
    likeliest = probabilities.argmax(axis=1)
    if filter_by == "predicted_neq_given":
        return likeliest != labels
    if filter_by == "confident_learning":
        wrong = (found.classes >= 0) & (found.classes != labels)
    elif filter_by == "prune_by_class":
        wrong = _by_class(labels, probabilities, found.estimated)
    elif filter_by == "prune_by_noise_rate":
        wrong = _by_noise_rate(labels, probabilities, found.estimated)
    else:
        wrong = _by_class(labels, probabilities, found.estimated)
        wrong &= _by_noise_rate(labels, probabilities, found.estimated)
    return wrong & (likeliest != labels)


def _by_class(labels: np.ndarray, probabilities: np.ndarray, estimated: np.ndarray) -> np.ndarray:
    """Of each label as many rows as are wrong: those that are given the least of it (self-confidence)."""
    wrong = np.zeros(len(labels), bool)
    for label, line in enumerate(estimated):
        rows = np.flatnonzero(labels == label)
        order = np.argsort(probabilities[rows, label], kind="stable")
        wrong[rows[order[: int(line.sum() - line[label])]]] = True
    return wrong


def _by_noise_rate(labels: np.ndarray, probabilities: np.ndarray, estimated: np.ndarray) -> np.ndarray:
    """Of each label and each other class as many rows as are really of that: those with the largest margin."""
    wrong = np.zeros(len(labels), bool)
    for label, line in enumerate(estimated):
        rows = np.flatnonzero(labels == label)
        for other in np.flatnonzero(line):
            if other != label:
                margin = probabilities[rows, other] - probabilities[rows, label]
                wrong[rows[np.argsort(-margin, kind="stable")[: line[other]]]] = True
    return wrong
