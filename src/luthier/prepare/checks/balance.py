"""How many rows each class has: classes that are rare, missing or not meant, and one that has nearly everything."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from ...settings import did_you_mean
from ..views import View
from .check import Again, Check, Decision, Finding, Gathered, Gatherer
from .label_noise import MANY, label_of

RARE, DOMINANT, SINGLE, MISSING, UNKNOWN = "rare", "dominant", "single", "missing", "undeclared"


class Balance(Check):
    """Of labelled rows, with one label each. What is so of a whole class, and not of each of its rows, is told at the
    first row that has it; missing classes at the first labelled row of which nothing else is told."""

    whats: ClassVar = (RARE, DOMINANT, SINGLE, MISSING, UNKNOWN)

    kind: Literal["balance"] = "balance"
    action: Literal["keep"] = "keep"
    classes: list[str] = []
    """All classes that there should be; without any, those that are there."""
    fewest: int = Field(5, ge=0)
    """Rows below which a class is rare."""
    rarest: float = Field(0.1, ge=0.0, le=1.0)
    """The same, as a share of what each class would have if all had as many."""
    largest: float = Field(0.9, gt=0.0, le=1.0)
    """Above this share of the rows, a class has nearly everything."""

    @field_validator("classes")
    @classmethod
    def _once(cls, classes: list[str]) -> list[str]:
        if twice := [name for name, count in Counter(classes).items() if count > 1]:
            raise ValueError(f"{twice[0]!r} is named twice")
        return classes

    def look(self, view: View) -> Sequence[Finding]:
        if not self.classes or (label := label_of(view)) is None or label in self.classes:
            return ()
        meant = did_you_mean(label, self.classes)
        return [Finding(UNKNOWN, f"{label!r} is none of the {len(self.classes)} classes{meant}")]

    def gatherer(self) -> Gatherer:
        return _Counted()

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        counts: Counter[str] = Counter()
        first: dict[str, int] = {}
        for g in gathered:
            for name, count, row in zip(_names(g), g.arrays["counts"].tolist(), g.arrays["first"].tolist()):
                counts[name] += count
                first.setdefault(name, row + g.first)
        if not counts:
            return Decision(summary={"rows": 0})
        if len(counts) > MANY and not self.classes:
            return Decision(summary={"rows": counts.total(), "classes": len(counts)})
        return self._decision(gathered, counts, first)

    def _decision(self, gathered: Sequence[Gathered], counts: Counter[str], first: dict[str, int]) -> Decision:
        total, meant = counts.total(), self.classes or sorted(counts)
        even = total / len(meant)
        told: list[tuple[int, str, str]] = []
        (most, many), least = counts.most_common(1)[0], min(meant, key=lambda name: counts[name])
        if len(counts) == 1:
            told.append((first[most], SINGLE, f"all {total:,} rows are labelled {most!r}"))
        elif many > self.largest * total:
            detail = f"{many:,} of {total:,} rows ({many / total:.1%}) are labelled {most!r}"
            told.append((first[most], DOMINANT, detail))
        few = max(self.fewest, self.rarest * even) if len(counts) > 1 else 0
        rare = [name for name in meant if 0 < counts[name] < few]
        for name in rare:
            detail = f"one of {counts[name]:,} rows labelled {name!r}; a class has {even:,.0f} on average"
            told += [(row, RARE, detail) for row in _rows_of(gathered, name)]
        if missing := [name for name in meant if not counts[name]]:
            detail = f"no row is labelled {', '.join(map(repr, missing))}"
            told.append((_free(gathered, {row for row, _, _ in told}), MISSING, detail))
        rows = _merged(told)
        summary = {
            "rows": total, "classes": len(counts), "counts": dict(counts.most_common()),
            "largest": {"class": most, "share": round(many / total, 4)},
            "rarest": {"class": least, "rows": counts[least], "share": round(counts[least] / total, 6)},
            "missing": missing,
        }  # fmt: skip
        whats = {found: place for place, found in enumerate(dict.fromkeys(rows.values()))}
        return Decision(
            np.array(sorted(rows), np.int64), [(what, _braced(detail)) for what, detail in whats],
            np.array([whats[rows[row]] for row in sorted(rows)], np.int64), summary=summary,
        )  # fmt: skip


def _free(gathered: Sequence[Gathered], taken: set[int]) -> int:
    """The first labelled row that is not taken; of none the first."""
    rows = (row + g.first for g in gathered for row in g.arrays["rows"].tolist())
    return next((row for row in rows if row not in taken), min(taken, default=0))


def _merged(told: Sequence[tuple[int, str, str]]) -> dict[int, tuple[str, str]]:
    """One finding a row: what is said of the same row stands in one detail."""
    made: dict[int, tuple[str, str]] = {}
    for row, what, detail in told:
        made[row] = (made[row][0], f"{made[row][1]}; {detail}") if row in made else (what, detail)
    return made


def _braced(text: str) -> str:
    """As it stands in a format string."""
    return text.replace("{", "{{").replace("}", "}}")


def _names(g: Gathered) -> list[str]:
    return json.loads(g.arrays["names"].tobytes() or b"[]")


def _rows_of(gathered: Sequence[Gathered], name: str) -> list[int]:
    rows: list[int] = []
    for g in gathered:
        names = _names(g)
        if name in names:
            rows += (g.arrays["rows"][g.arrays["labels"] == names.index(name)] + g.first).tolist()
    return rows


class _Counted(Gatherer):
    def __init__(self) -> None:
        self.rows, self.labels = array("q"), array("i")
        self.names: dict[str, int] = {}

    def add(self, number: int, view: View) -> None:
        if (label := label_of(view)) is not None:
            self.rows.append(number)
            self.labels.append(self.names.setdefault(label, len(self.names)))

    def arrays(self) -> dict[str, np.ndarray]:
        labels, rows = np.array(self.labels, np.int64), np.array(self.rows, np.int64)
        counts: Any = np.bincount(labels, minlength=len(self.names))
        first = np.unique(labels, return_index=True)[1]
        return {"rows": rows, "labels": labels, "counts": counts, "first": rows[first],
                "names": np.frombuffer(json.dumps(list(self.names)).encode(), np.uint8)}  # fmt: skip
