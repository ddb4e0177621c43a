"""Figures of classes: accuracy, precision, recall, F1, MCC, AUROC, confusion; of values their errors and correlations.

All but AUROC and Spearman's correlation are functions of sums over rows, which is what intervals are made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .figures import greater_is_better
from .intervals import Figure, mean, quotient

Columns = Mapping[str, np.ndarray]
PREFIXES = ("classes.", "tags.", "entities.")  # of the columns that are counted here


def figures(columns: Columns) -> dict[str, Figure]:
    """All figures that these columns [N] of rows have something for, by name."""
    out: dict[str, Figure] = {}
    names = named(columns, "classes.one.label.")
    if names:
        scores, has = (stacked(columns, f"classes.one.{what}.", names) for what in ("score", "label"))
        out |= of_one(scores, has, names)
    names = named(columns, "classes.several.label.")
    if names:
        scores, has = (stacked(columns, f"classes.several.{what}.", names) for what in ("score", "label"))
        out |= of_several(scores, has, names)
    if "classes.value.label.value" in columns:
        out |= of_values(columns["classes.value.score.value"], columns["classes.value.label.value"])
    names = named(columns, "tags.true.")
    if names:
        out |= _of_tags(columns, names)
    return out


def named(columns: Columns, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in columns if key.startswith(prefix)]


def stacked(columns: Columns, prefix: str, names: list[str]) -> np.ndarray:
    """[N, K]"""
    return np.stack([columns[prefix + name] for name in names], 1)


# ---------------------------------------------------------------------------- one label, or several


def of_one(scores: np.ndarray, has: np.ndarray, names: list[str]) -> dict[str, Figure]:
    """Of rows with one label each: scores and labels [N, K], the likeliest label being said."""
    said = np.eye(len(names))[scores.argmax(1)]
    statistics = _statistics(has, said)
    out = {"accuracy": mean((has * said).sum(1)), **_averages(statistics, len(names), present=True)}
    out["mcc"] = Figure(statistics, matthews)
    if (auroc := _auroc(scores, has)) is not None:
        out["auroc"] = auroc
    return out | _of_each(statistics, names)


def of_several(scores: np.ndarray, has: np.ndarray, names: list[str]) -> dict[str, Figure]:
    """Of rows with any number of labels: scores in [0, 1] and labels [N, K]; above 0.5 a label is said. A row is right
    with all of its labels right."""
    said = (scores > 0.5).astype(np.float64)
    statistics = _statistics(has, said)
    out = {"accuracy": mean((said == has).all(1)), **_averages(statistics, len(names), present=False)}
    if (auroc := _auroc(scores, has)) is not None:
        out["auroc"] = auroc
    return out | _of_each(statistics, names)


def _statistics(has: np.ndarray, said: np.ndarray) -> np.ndarray:
    """[N, 3 K] right, said, true."""
    return np.concatenate([has * said, said, has], 1).astype(np.float64)


def _parts(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[R, 3 K] -> right, said, true [R, K] each."""
    size = sums.shape[1] // 3
    return sums[:, :size], sums[:, size : 2 * size], sums[:, 2 * size :]


def _share(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where there is nothing to share, as where a label is never said."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "precision": lambda right, said, true: _share(right, said),
    "recall": lambda right, said, true: _share(right, true),
    "f1": lambda right, said, true: _share(2 * right, said + true),
}


def _averages(statistics: np.ndarray, size: int, present: bool) -> dict[str, Figure]:
    """Macro: the mean over labels, with `present` over those that a row has or is said to have. Micro: of all labels
    together."""

    def macro(measure: Callable) -> Callable[[np.ndarray], np.ndarray]:
        def of_sums(sums: np.ndarray) -> np.ndarray:
            right, said, true = _parts(sums)
            counted = (said + true > 0) if present else np.ones_like(said, dtype=bool)
            return _share((measure(right, said, true) * counted).sum(1), counted.sum(1).astype(np.float64))

        return of_sums

    def micro(measure: Callable) -> Callable[[np.ndarray], np.ndarray]:
        return lambda sums: measure(*(part.sum(1) for part in _parts(sums)))

    out = {f"{name}_macro": Figure(statistics, macro(measure)) for name, measure in MEASURES.items()}
    return out | {f"{name}_micro": Figure(statistics, micro(measure)) for name, measure in MEASURES.items()}


def _of_each(statistics: np.ndarray, names: list[str]) -> dict[str, Figure]:
    """The measures of each label, `f1.NAME` and the like."""
    size, out = len(names), {}
    for i, name in enumerate(names):
        own = statistics[:, [i, size + i, 2 * size + i]]
        for key, measure in MEASURES.items():
            out[f"{key}.{name}"] = Figure(own, lambda sums, measure=measure: measure(*sums.T))
    return out


def matthews(sums: np.ndarray) -> np.ndarray:
    """Matthews' correlation for any number of labels (Gorodkin 2004): (c s - p t) / sqrt((s^2 - p p) (s^2 - t t))."""
    right, said, true = _parts(sums)
    c, s = right.sum(1), true.sum(1)
    above = c * s - (said * true).sum(1)
    below = (s**2 - (said**2).sum(1)) * (s**2 - (true**2).sum(1))
    return _share(above, np.sqrt(np.maximum(below, 0)))


def _auroc(scores: np.ndarray, has: np.ndarray) -> Figure | None:
    """The area under the ROC curve; of two labels of the second, of more the mean over each against all others."""
    columns = [1] if scores.shape[1] == 2 and (has.sum(1) == 1).all() else range(scores.shape[1])
    found = [pseudo_values(scores[:, k], has[:, k] > 0) for k in columns if 0 < has[:, k].sum() < len(has)]
    return mean(np.mean(found, 0)) if found else None


def pseudo_values(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """[N] values whose mean is the area under the ROC curve, and whose spread is that of its estimate.

    The area is the share of pairs of a positive and a negative that are in order, ties counting half. A row's part in
    it is the share of its own pairs (DeLong, DeLong and Clarke-Pearson 1988).
    """
    up, down = np.sort(scores[positive]), np.sort(scores[~positive])

    def below(sorted_ones: np.ndarray, of: np.ndarray) -> np.ndarray:
        """The share of them that is smaller, with half of those that are equal."""
        left, right = np.searchsorted(sorted_ones, of, "left"), np.searchsorted(sorted_ones, of, "right")
        return (left + right) / (2 * len(sorted_ones))

    parts = np.where(positive, below(down, scores), 1 - below(up, scores))
    area = parts[positive].mean()
    share = np.where(positive, len(up), len(down)) / len(scores)
    return area + (parts - area) / share


def confusion(columns: Columns) -> tuple[list[str], np.ndarray] | None:
    """Of rows with one label each: their names, and how many rows of each label [K] are said to be of each [K]."""
    names = named(columns, "classes.one.label.")
    if not names:
        return None
    scores, has = (stacked(columns, f"classes.one.{what}.", names) for what in ("score", "label"))
    made = np.zeros((len(names), len(names)), np.int64)
    np.add.at(made, (has.argmax(1), scores.argmax(1)), 1)
    return names, made


# ---------------------------------------------------------------------------- values


def of_values(said: np.ndarray, true: np.ndarray) -> dict[str, Figure]:
    """Of rows with a value each [N]: mean squared and absolute error, Pearson's and Spearman's correlation."""
    ones, error = np.ones_like(said), said - true
    return {
        "mse": Figure(np.stack([error**2, ones], 1), quotient, greater_is_better("mse")),
        "mae": Figure(np.stack([abs(error), ones], 1), quotient, greater_is_better("mae")),
        "pearson": _correlation(said, true),
        "spearman": _correlation(ranks(said), ranks(true)),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> Figure:
    x, y = x - x.mean(), y - y.mean()  # sums of squares of large numbers would lose what is small
    return Figure(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1), _pearson)


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))


def ranks(values: np.ndarray) -> np.ndarray:
    """From 1 on; equal values share the mean of theirs."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2


# ---------------------------------------------------------------------------- tags of words


def _of_tags(columns: Columns, names: list[str]) -> dict[str, Figure]:
    """Of words, and of whole entities where the tags name such: all words of one, its kind and its borders right."""
    statistics = np.concatenate([stacked(columns, f"tags.{what}.", names) for what in ("right", "said", "true")], 1)
    right, _, true = _parts(statistics)
    out = {"accuracy": Figure(np.stack([right.sum(1), true.sum(1)], 1), quotient)}
    out |= _averages(statistics, len(names), present=True)
    kinds = named(columns, "entities.true.")
    if kinds:
        counts = np.concatenate([stacked(columns, f"entities.{what}.", kinds) for what in ("right", "said", "true")], 1)
        averages = _averages(counts, len(kinds), present=True)
        out |= {f"entity_{key}": averages[f"{key}_micro"] for key in MEASURES}
        out["entity_f1_macro"] = averages["f1_macro"]
        out |= {f"entity_{key}": figure for key, figure in _of_each(counts, kinds).items()}
    return out | _of_each(statistics, names)


def table(names: list[str], counts: Any) -> dict[str, Any]:
    """A confusion matrix for a report."""
    return {"labels": names, "counts": np.asarray(counts).tolist()}
