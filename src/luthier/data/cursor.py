"""The rows of a stream's files, file after file in an order of each pass, from any place on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from . import Data, Source, sources
from .dataset import form_of, named
from .sources import Row


class Place(NamedTuple):
    """Where a reader stands: the pass, the file in the order of that pass, and the next row of that file."""

    epoch: int = 0
    file: int = 0
    row: int = 0


class Read(NamedTuple):
    """A row, with the source that it belongs to and the pass in which it was read."""

    row: Row
    source: int
    epoch: int


class Reader:
    """The rows of some sources: file after file in another order in each pass, without those that are held out."""

    def __init__(self, entries: Sequence[tuple[int, Source]], data: Data, number: int):
        self.entries, self.seed, self.number = dict(entries), data.seed, number
        self.sample_by = data.sample_by
        self.files: list[tuple[int, str]] = []
        for index, entry in entries:
            for name in [entry.path] if isinstance(entry.path, str) else entry.path:
                found = sources.files_of(name, entry.split or "train")
                self.files += [(index, name if found is None else str(path)) for path in found or [Path(name)]]
        self.name = ", ".join(named(entry) for _, entry in entries)
        self.leading: dict[int, int] = {}  # file -> how many of its first rows are held out
        self.held: Callable[[Row], bool] | None = None
        self.place = Place()
        self.gave = False  # whether the pass at hand gave a row
        self._open: tuple[Place, Iterator[Row]] | None = None

    def listing(self) -> list[list]:
        """The files with their sizes: what can be told of their content without reading them."""
        told = []
        for _, name in self.files:
            path = Path(name)
            told.append([path.name, path.stat().st_size if path.is_file() else None])
        return told

    def go(self, place: Place) -> None:
        if self.place != place:
            self.close()
            self.place, self.gave = place, place != Place(place.epoch)

    def order(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, epoch, self.number + 1, 1 << 31]).permutation(len(self.files)).tolist()

    def forms(self, kind: str) -> dict[int, tuple[str, str]]:
        """The format of each source, and how the first rows of its first file told it."""
        made: dict[int, tuple[str, str]] = {}
        for index, name in self.files:
            if index not in made:
                rows = self._rows(index, name, 0)
                made[index] = form_of(self.entries[index], rows, kind)[:2]
                rows.close()  # type: ignore[attr-defined]
        return made

    def in_order(self) -> Iterator[tuple[int, Read]]:
        """Every row once, file after file as they are named, with the number of its file."""
        for file, (index, name) in enumerate(self.files):
            for row in self._rows(index, name, 0):
                yield file, Read(row, index, 0)

    def take(self, count: int, one_pass: bool) -> list[Read]:
        """The next `count` rows, or with `one_pass` those up to the end of the pass."""
        taken: list[Read] = []
        while len(taken) < count:
            read = self._next()
            if read is not None:
                taken.append(read)
            elif one_pass and taken:
                break
        return taken

    def _next(self) -> Read | None:
        """The next row; None at the end of a pass."""
        while True:
            epoch, position, _ = self.place
            file = self.order(epoch)[position]
            index, name = self.files[file]
            if self._open is None or self._open[0] != self.place:
                self.close()
                self.place = self.place._replace(row=max(self.place.row, self.leading.get(file, 0)))
                self._open = (self.place, self._rows(index, name, self.place.row))
            for row in self._open[1]:
                self.place = self.place._replace(row=row.number + 1)
                self._open = (self.place, self._open[1])
                if self.held is None or not self.held(row):
                    self.gave = True
                    return Read(row, index, epoch)
            if position + 1 < len(self.files):
                self.place = Place(epoch, position + 1)
                continue
            if not self.gave:
                raise DataError(f"{self.name}: no row is left to train on: all are held out")
            self.place, self.gave = Place(epoch + 1), False
            return None

    def _rows(self, index: int, name: str, start: int) -> Iterator[Row]:
        entry = self.entries[index]
        return sources.read(name, entry.subset, entry.split or "train", start, self.sample_by)

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()  # type: ignore[attr-defined]
            self._open = None
