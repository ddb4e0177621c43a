"""Check: the base of everything that is looked for in rows; what it finds, what is then done, and how it decides.

A check looks at one row at a time (`look`), or gathers numbers of all rows and decides once (`gatherer`, `decide`); it
may do both. It never sees files: rows come as views, and what it gathers is kept by the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from ...settings import Settings
from ..views import View

Action = Literal["drop", "repair", "keep"]


class Span(NamedTuple):
    """A stretch of one of a view's texts."""

    text: int  # which of `view.texts`
    start: int
    stop: int


class Finding(NamedTuple):
    """Something found in a row; the engine adds the row's number and place."""

    what: str  # which of the things that its check looks for, such as "email"
    detail: str = ""  # for people; never the secret itself
    spans: tuple[Span, ...] = ()


class Gatherer:
    """What a check keeps of the rows of a piece, as arrays: no Python object may stay for each row."""

    def add(self, number: int, view: View) -> None:
        """Take in a row; `number` counts in its piece, and rows that are dropped by then are not shown."""
        raise NotImplementedError

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, once the piece is at its end; kept as safetensors until the check decides."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gathered:
    """What was gathered of a piece."""

    first: int  # the number of the piece's row 0 in the whole; array of numbers + first = numbers in the whole
    arrays: Mapping[str, np.ndarray]  # mapped from the disk


@dataclass(frozen=True)
class Decision:
    """What a check says of the whole set: which rows it found, by number in the whole."""

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [N] int64, rising
    what: Sequence[str] = ()  # names of the things found; `codes` are places in it
    codes: np.ndarray | None = None  # [N] which of `what`; all are the first without it
    others: np.ndarray | None = None  # [N] int64: the row that a row is found because of, -1 for none
    numbers: np.ndarray | None = None  # [N] float: a measure, such as a similarity
    detail: str = "{what}"  # for people, with {what}, {other} (row and place), {number}
    summary: Mapping = field(default_factory=dict)  # JSON, for the verdict and the page


Again = Callable[[], Iterable[tuple[int, View]]]  # all rows once more, in order, with their numbers in the whole


class Check(Settings):
    """A check's settings; `kind` names it in recipes. A subclass narrows `action` to what it can do."""

    kind: str
    action: Action = "keep"
    """What `luthier data clean` does with a row in which this is found: `drop` it, `repair` it, or `keep` it as it is."""
    allowed: float = Field(0.0, ge=0.0, le=1.0)
    """The share of rows in which this may be found before the verdict of an audit is a fault."""

    def prepared(self) -> Check:
        """The check as it works, in each process: what has to be loaded or compiled first is kept on it."""
        return self

    # one row

    def look(self, view: View) -> Sequence[Finding]:
        """What is found in this row by itself."""
        return ()

    def repair(self, view: View, findings: Sequence[Finding]) -> dict[int, str]:
        """Other texts by their place in `view.texts`; a finding that cannot be repaired is left, and its row dropped."""
        raise NotImplementedError

    # the whole set

    def gatherer(self) -> Gatherer | None:
        """A new one for each piece, of a check that decides over the whole set; None of one that does not."""
        return None

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        """What is found over the whole set, from the pieces in their order."""
        raise NotImplementedError

    def proposed(self, summary: Mapping) -> Check:
        """The check as the recipe of an audit has it, with thresholds taken from the data written down as numbers."""
        return self
