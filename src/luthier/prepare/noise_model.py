"""How likely a label is wrong: held-out predictions, calibrated, and how often each class is labelled as each other.

A row really is of class k with probability q_k, proportional to p_k^t: the prediction p at a temperature of 1 / t
(arXiv:1706.04599). A row of class k is labelled y with probability T[k, y], whatever its text (Dawid and Skene, 1979;
arXiv:1406.2080). t and T are those under which the labels are likeliest: T by expectation-maximisation, t out of a few.
Then the label y of a row is wrong with probability 1 - q_y T[y, y] / sum_k q_k T[k, y].

Confident learning takes a classifier's doubt for wrong labels: where the classes are hard to tell apart, it counts
several times as many as there are. Here doubt that the labels do not bear out only lowers t.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

POWERS = np.exp(np.linspace(np.log(0.4), np.log(4.0), 9))  # what t may be
PRIOR = 5.0  # rows of each class that are as good as seen: labelled wrong as often as on average, evenly
STEPS = 30  # of expectation-maximisation; a class-wise mixture changes little after ten
MOST = 1 << 20  # probabilities that are fitted to: of more rows evenly spaced ones
LOWEST, HIGHEST = 1e-3, 0.5  # of the share of wrong labels
_LEAST = 1e-3  # of how likely the likeliest is
_BLOCK = 1 << 22  # probabilities that are held as float64 at a time


class NoiseModel(NamedTuple):
    """What was fitted, for each t that counts."""

    weights: tuple[float, ...]  # how likely each is; they add up to 1
    powers: tuple[float, ...]  # t
    labelled: tuple[np.ndarray, ...]  # T [K, K] float64: a row of class k is labelled y; lines add up to 1


def fitted(labels: np.ndarray, probabilities: np.ndarray) -> NoiseModel:
    """Of labels [N] in 0..K-1 and held-out probabilities [N, K]."""
    rows, classes = probabilities.shape
    if (most := max(1, MOST // classes)) < rows:
        chosen = np.linspace(0, rows - 1, most).astype(np.int64)
        labels, probabilities = labels[chosen], probabilities[chosen]
    order = np.argsort(labels, kind="stable")  # so that sums over rows of a label are sums of neighbours
    labels, logs = labels[order], _logs(probabilities[order])
    made = [(*_likeliest(labels, _powered(logs, power)), power) for power in POWERS.tolist()]
    highest = max(likely for likely, _, _ in made)
    made = [(float(np.exp(likely - highest)), matrix, power) for likely, matrix, power in made]
    weights, matrices, powers = zip(*(one for one in made if one[0] > _LEAST))
    return NoiseModel(tuple(weight / sum(weights) for weight in weights), powers, matrices)


def wrong(labels: np.ndarray, probabilities: np.ndarray, model: NoiseModel) -> tuple[np.ndarray, np.ndarray]:
    """(probability that each label is wrong [N], expected rows by label and by what they really are [K, K])."""
    rows, classes = probabilities.shape
    made, counts = np.empty(rows), np.zeros((classes, classes))
    step = max(1, _BLOCK // classes)
    for first in range(0, rows, step):
        own, logs = labels[first : first + step], _logs(probabilities[first : first + step])
        whole = np.zeros_like(logs)
        for weight, power, labelled in zip(*model):
            joint = _powered(logs, power) * labelled.T[own]
            whole += joint * (weight / joint.sum(axis=1, keepdims=True))
        made[first : first + step] = 1 - whole[np.arange(len(own)), own]
        np.add.at(counts, own, whole)
    return np.clip(made, 0.0, 1.0), counts


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), 1e-12))


def _powered(logs: np.ndarray, power: float) -> np.ndarray:
    made = np.exp(logs * power - (logs * power).max(axis=1, keepdims=True))
    return made / made.sum(axis=1, keepdims=True)


def _even(share: float, classes: int) -> np.ndarray:
    """T of a share of wrong labels, evenly of all other classes."""
    made = np.full((classes, classes), share / max(1, classes - 1))
    np.fill_diagonal(made, 1 - share if classes > 1 else 1.0)
    return made


def _likeliest(labels: np.ndarray, real: np.ndarray) -> tuple[float, np.ndarray]:
    """(logarithm of how likely labels, in order, and T are; T) for rows that are of classes with probabilities [N, K].

    T is drawn towards even mistakes, of as many rows as there are on average: a Dirichlet of PRIOR rows beside a flat.
    """
    rows, classes = real.shape
    names, starts = np.unique(labels, return_index=True)
    prior = matrix = _even(0.05, classes)
    for _ in range(STEPS):
        joint = real * matrix.T[labels]
        joint /= joint.sum(axis=1, keepdims=True)
        counts = np.zeros((classes, classes))
        counts[:, names] = np.add.reduceat(joint, starts, axis=0).T
        prior = _even(float(np.clip(1 - np.trace(counts) / rows, LOWEST, HIGHEST)), classes)
        matrix = counts + PRIOR * prior
        matrix /= matrix.sum(axis=1, keepdims=True)
    seen = np.log((real * matrix.T[labels]).sum(axis=1)).sum()
    return float(seen + PRIOR * (prior * np.log(matrix / prior)).sum()), matrix
