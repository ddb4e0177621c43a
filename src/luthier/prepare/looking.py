"""All checks over the rows of a piece: what is found, what is gathered for decisions over the whole set, and where."""

from __future__ import annotations

import errno
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import formats
from ..data.readers import kind_of, shown
from ..data.sources import Row
from ..errors import DataError
from .checks.check import Check, Decision, Finding, Gathered, Gatherer
from .checks.structure import UNREADABLE, Structure
from .pieces import Done, Work, rows_of
from .recipe import Recipe, prepared
from .views import View, view

EXAMPLES = 50  # findings of each check that a verdict and its page list
HOPELESS = 1000  # unreadable rows at the beginning of a file before it is given up


class Looking(Work):
    """Looks at rows as they are: what an audit does."""

    def __init__(self, recipe: Recipe, given: Mapping[str, str]):
        self.columns = recipe.columns
        self.checks = prepared(list(recipe.checks.values()), given)
        self.found = Found(self.checks)
        self.gathering = Gathering([c for c in self.checks if c.gatherer() is not None])
        self.lookers = [c for c in self.checks if type(c).look is not Check.look]
        self.formats: dict[str, int] = {}
        self.readable = Readable(recipe.columns)

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        self.gathering.begin(piece, folder, number)

    def row(self, row: Row) -> Iterable[tuple[str, dict]]:
        if self.readable.fault(row):
            check = next((c for c in self.checks if isinstance(c, Structure)), Structure())
            return [("findings", self.found.add(row, check, Finding(UNREADABLE, row.fault or ""), None))]
        values = formats.renamed(row.values, self.columns) if self.columns else row.values
        seen = view(values, row.number, row.place)
        self.formats[seen.format] = self.formats.get(seen.format, 0) + 1
        told = []
        for check in self.lookers:
            if findings := check.look(seen):
                told += [("findings", self.found.add(row, check, finding, seen)) for finding in findings]
        self.gathering.add(row, seen)
        return told

    def end(self) -> dict:
        self.readable.end()
        self.gathering.end()
        return {**self.found.told(), "formats": self.formats, "unreadable": self.readable.faults}


class Readable:
    """Counts unreadable rows; a file that begins with nothing else is not what its name says.

    Nor is one in which no row has a column that the recipe names: what was meant would not be looked at.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.rows = self.faults = 0
        self.first = ""
        self.absent = set(columns.values())
        self.columns = columns

    def fault(self, row: Row) -> bool:
        self.rows += 1
        if row.fault is None:
            if self.absent:
                self.absent -= row.values.keys()
                if self.absent and self.rows - self.faults == HOPELESS:
                    self.refuse_absent(row)
                self.there = row
            return False
        self.faults += 1
        self.first = self.first or f"{row.place}: {row.fault}"
        if self.faults == self.rows == HOPELESS:
            raise DataError(f"{self.first}; and so are the {HOPELESS - 1} rows after it")
        return True

    def end(self) -> None:
        if self.absent and self.rows > self.faults:
            self.refuse_absent(self.there)

    def refuse_absent(self, row: Row) -> None:
        key, column = next((k, c) for k, c in self.columns.items() if c in self.absent)
        raise DataError(
            f"columns.{key}: no row up to {row.place} has a column {column!r}; it has "
            f"{', '.join(map(repr, row.values)) or 'nothing'}"
        )


class Found:
    """Counts of findings, and the first of them."""

    def __init__(self, checks: Sequence[Check]):
        self.counts: dict[str, Counter[str]] = {check.kind: Counter() for check in checks}
        self.rows: Counter[str] = Counter()  # rows in which a check found anything
        self.acting: Counter[str] = Counter()  # and of those the ones that cleaning would drop or repair
        self.last: dict[tuple[str, bool], int] = {}
        self.examples: dict[str, list[dict]] = {}

    def add(self, row: Row, check: Check, finding: Finding, seen: View | None) -> dict:
        """Count a finding, and the line that tells it."""
        kind, action = check.kind, check.action_of(finding.what)
        self.counts.setdefault(kind, Counter())[finding.what] += 1
        for acting in (False, True) if action != "keep" else (False,):
            if self.last.get((kind, acting)) != row.number:
                self.last[kind, acting] = row.number
                (self.acting if acting else self.rows)[kind] += 1
        told: dict[str, Any] = {
            "row": row.number,
            "place": row.place,
            "check": kind,
            "what": finding.what,
            "action": action,
            "detail": finding.detail,
        }
        if seen is not None and finding.spans:
            told["spans"] = [[list(seen.texts[s.text].path), s.start, s.stop] for s in finding.spans]
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append({key: told[key] for key in ("row", "place", "what", "detail")})
        return told

    def told(self) -> dict:
        return {
            "counts": {kind: dict(counts) for kind, counts in self.counts.items()},
            "rows": dict(self.rows),
            "acting": dict(self.acting),
            "examples": self.examples,
        }


# ---------------------------------------------------------------------------- the whole set


class Gathering:
    """Gathers for checks that decide over the whole set, into files of arrays beside the journal."""

    def __init__(self, checks: Sequence[Check], places: bool = True):
        self.places = places  # whether it will be asked where rows stand
        self.gatherers: list[tuple[str, Gatherer]] = [(c.kind, g) for c in checks if (g := c.gatherer()) is not None]
        self.lines, self.rows = array("q"), array("q")

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        # The name and ":" or "[" stand before the number in a place.
        self.before = len(getattr(piece, "hub", None) or shown(getattr(piece, "path", ""))) + 1

    def add(self, row: Row, seen: View) -> None:
        if self.gatherers:
            for _, gatherer in self.gatherers:
                gatherer.add(row.number, seen)
            if not self.places:
                return
            number = row.place[self.before :]
            self.lines.append(int(number) if number.isdecimal() else int(number[:-1]) if number.endswith("]") else 0)
            self.rows.append(row.number)

    def end(self) -> None:
        if self.gatherers:
            for kind, gatherer in self.gatherers:
                save(gathered_file(self.folder, kind, self.number), gatherer.arrays())
            if not self.places:
                return
            places = {"lines": np.array(self.lines, np.int64), "rows": np.array(self.rows, np.int64)}
            save(gathered_file(self.folder, PLACES, self.number), places)


PLACES = "places"


def gathered_file(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:06}.safetensors"


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside)
    except SafetensorError as error:  # as a system's error, which a full disk is
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, os.strerror(int(code[1])) if code else str(error),
                      str(path)) from None  # fmt: skip
    os.replace(aside, path)


def load(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def decided(
    checks: Sequence[Check], done: Sequence[Done], folder: Path, again: Callable[[], Iterator[tuple[int, View]]]
) -> dict[str, Decision]:
    """What each check that gathered says of the whole set."""
    made = {}
    for check in checks:
        gathered = [Gathered(d.first, load(gathered_file(folder, check.kind, d.number))) for d in done]
        made[check.kind] = check.decided(gathered, again, folder)
    return made


class Places:
    """Where rows stand, by their numbers in the whole."""

    def __init__(self, done: Sequence[Done], folder: Path):
        self.done, self.folder = done, folder
        self.firsts = np.array([d.first for d in done])
        self.known: tuple[int, dict] = (-1, {})

    def __call__(self, number: int) -> str:
        which = int(np.searchsorted(self.firsts, number, side="right")) - 1  # of pieces without rows the last
        if self.known[0] != which:
            self.known = which, load(gathered_file(self.folder, PLACES, self.done[which].number))
        arrays, path = self.known[1], self.done[which].piece.path
        line = int(arrays["lines"][np.searchsorted(arrays["rows"], number - self.done[which].first)])
        if hub := self.done[which].piece.hub:
            return f"{hub}[{line}]"
        if kind_of(path)[0] in (".parquet", ".arrow", ".feather", ".json"):
            return f"{shown(path)}[{line}]"
        return f"{shown(path)}:{line}" if line else shown(path)


def findings_of(check: Check, decision: Decision, places: Places) -> Iterator[tuple[int, Finding, str]]:
    """(number in the whole, finding, place) of each row that a decision found."""
    for at, number in enumerate(decision.rows.tolist()):
        code, other, value = decision.at(at)
        what, detail = decision.told[code]
        where = f"{other:,} ({places(other)})" if other >= 0 and "{other}" in detail else ""
        yield number, Finding(what, detail.format(other=where, number=value)), places(number)


def views(done: Sequence[Done], settle: Callable[[Row], View | None]) -> Iterator[tuple[int, View]]:
    """All rows that are kept once more, with their numbers in the whole."""
    for d in done:
        for row in rows_of(d.piece):
            if row.fault is None and (seen := settle(row)) is not None:
                yield d.first + row.number, seen
