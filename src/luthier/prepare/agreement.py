"""How far annotators agree beyond chance: Cohen's and Fleiss' kappa, Krippendorff's alpha.

Cohen, 1960 (https://doi.org/10.1177/001316446002000104) and 1968 with weights (https://doi.org/10.1037/h0026256);
Fleiss, 1971 (https://doi.org/10.1037/h0031619); Krippendorff, 2011 (https://repository.upenn.edu/asc_papers/43).
Each is 1 - observed / expected disagreement; nan where none could be expected, as all say the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

Weights = Literal["linear", "quadratic"]
Level = Literal["nominal", "ordinal", "interval"]


def cohen(
    first: Sequence[Hashable], second: Sequence[Hashable], weights: Weights | None = None,
    order: Sequence[Hashable] | None = None,
) -> float:  # fmt: skip
    """Of two annotators who both labelled each row. With weights, labels have an `order`, by default the sorted one."""
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} labels of the one and {len(second)} of the other; there is one of each for a row"
        )
    if not first:
        return math.nan
    names = list(order) if order is not None else _sorted({*first, *second})
    places = {name: i for i, name in enumerate(names)}
    table = np.zeros((len(names), len(names)))  # [L, L] rows by what the one says and what the other does
    np.add.at(table, ([places[a] for a in first], [places[b] for b in second]), 1)
    apart = np.abs(np.subtract.outer(np.arange(len(names)), np.arange(len(names)))).astype(float)
    cost = apart if weights == "linear" else apart**2 if weights == "quadratic" else (apart > 0).astype(float)
    expected = np.outer(table.sum(1), table.sum(0)) / len(first)
    return _beyond_chance(float((cost * table).sum()), float((cost * expected).sum()))


def fleiss(rows: Sequence[Sequence[Hashable]]) -> float:
    """Of rows that equally many annotators labelled, perhaps not the same ones: `rows[i]` are the labels of row i."""
    sizes = {len(row) for row in rows}
    if not rows:
        return math.nan
    if len(sizes) > 1 or min(sizes) < 2:
        raise ValueError("Fleiss' kappa wants as many labels of each row, two at least; Krippendorff's alpha does not")
    [raters] = sizes
    counts = [Counter(row) for row in rows]
    shares = sum(counts, Counter())
    agreed = sum(sum(n * (n - 1) for n in count.values()) / (raters * (raters - 1)) for count in counts) / len(rows)
    chance = sum((n / (raters * len(rows))) ** 2 for n in shares.values())
    return _beyond_chance(1 - agreed, 1 - chance)


def krippendorff(
    rows: Sequence[Sequence[Hashable]], level: Level = "nominal", order: Sequence[Hashable] | None = None
) -> float:
    """Of rows with any numbers of labels; one with a single label says nothing. `interval` takes numbers as labels,
    `ordinal` an `order`, by default the sorted one."""
    return krippendorff_of(((row, 1) for row in rows), level, order)


def krippendorff_of(
    rows: Iterable[tuple[Sequence[Hashable], int]], level: Level = "nominal", order: Sequence[Hashable] | None = None
) -> float:
    """Of labels that several rows have alike: (labels, how many rows have them)."""
    pairable = [(row, times) for row, times in rows if len(row) > 1]
    if not pairable:
        return math.nan
    names = list(order) if order is not None else _sorted({label for row, _ in pairable for label in row})
    places = {name: i for i, name in enumerate(names)}
    together = np.zeros((len(names), len(names)))  # [L, L] the table of coincidences
    for row, times in pairable:
        counts = np.zeros(len(names))
        for label in row:
            counts[places[label]] += 1
        together += times * (np.outer(counts, counts) - np.diag(counts)) / (len(row) - 1)
    margins = together.sum(1)
    cost = _distances(level, names, margins)
    expected = (np.outer(margins, margins) - np.diag(margins)) / (margins.sum() - 1)
    return _beyond_chance(float((cost * together).sum()), float((cost * expected).sum()))


def _distances(level: Level, names: Sequence, margins: np.ndarray) -> np.ndarray:
    """[L, L] squared distances between labels."""
    if level == "nominal":
        return 1.0 - np.eye(len(names))
    if level == "interval":
        return np.subtract.outer(np.array(names, float), np.array(names, float)) ** 2
    middle = np.cumsum(margins) - margins / 2  # the rank of each label: ties are in the middle of theirs
    return np.subtract.outer(middle, middle) ** 2


def _beyond_chance(observed: float, expected: float) -> float:
    return 1 - observed / expected if expected > 1e-12 else math.nan


def _sorted(names: set) -> list:
    try:
        return sorted(names)
    except TypeError:
        return sorted(names, key=str)


def summary(votes: Mapping[str, Mapping[Any, Hashable]]) -> dict:
    """What annotators' labels, by name and row, amount to: JSON. A figure that cannot be told is None."""
    by_row: dict[Any, list[Hashable]] = {}
    for labels in votes.values():
        for row, label in labels.items():
            by_row.setdefault(row, []).append(label)
    several = [by_row[row] for row in sorted(by_row) if len(by_row[row]) > 1]
    pairs = {}
    for one, other in combinations(sorted(votes), 2):
        both = sorted(votes[one].keys() & votes[other].keys())
        if both:
            a, b = ([votes[name][row] for row in both] for name in (one, other))
            same = sum(x == y for x, y in zip(a, b))
            pairs[f"{one}, {other}"] = {"rows": len(both), "same": same / len(both), "cohen": _told(cohen(a, b))}
    sizes = {len(row) for row in several}
    return {
        "annotators": {name: len(votes[name]) for name in sorted(votes)}, "rows": len(by_row), "compared": len(several),
        "same": sum(len(set(row)) == 1 for row in several) / len(several) if several else None,
        "pairs": pairs, "fleiss": _told(fleiss(several)) if len(sizes) == 1 else None,
        "krippendorff": _told(krippendorff(several)),
    }  # fmt: skip


def _told(figure: float) -> float | None:
    return None if math.isnan(figure) else round(figure, 6)
