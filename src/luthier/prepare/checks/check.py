"""Check: the base of everything that is looked for in rows; what it finds, what is then done, and how it decides.

A check looks at one row at a time (`look`), or gathers numbers of all rows and decides once (`gatherer`, `decide`); it
may do both. It never sees files: rows come as views, and what it gathers is kept by the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
from pydantic import Field, model_validator

from ...settings import Settings, nearest
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

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [N] int64, rising, each once
    told: Sequence[
        tuple[str, str]
    ] = ()  # (what was found, for people with {other} and {number}) that `codes` points at
    codes: np.ndarray | None = None  # [N] which of `told`; all are the first without it
    others: np.ndarray | None = None  # [N] int64: the row that a row is found because of, -1 for none
    numbers: np.ndarray | None = None  # [N] float: a measure, such as a similarity
    summary: Mapping = field(default_factory=dict)  # JSON, for the verdict and the page

    def at(self, place: int) -> tuple[int, int, float]:
        """(code, other row, number) of a row found, by its place in `rows`."""
        return (
            int(self.codes[place]) if self.codes is not None else 0,
            int(self.others[place]) if self.others is not None else -1,
            float(self.numbers[place]) if self.numbers is not None else 0.0,
        )


Again = Callable[[], Iterable[tuple[int, View]]]  # all rows once more, in order, with their numbers in the whole


class Check(Settings):
    """A check's settings; `kind` names it in recipes. A subclass narrows `action` to what it can do."""

    whats: ClassVar[tuple[str, ...]] = ()  # all that it can find
    beyond_repair: ClassVar[tuple[str, ...]] = ()  # of these what no repair undoes: where others are repaired, dropped

    kind: str
    action: Action = "keep"
    """What `luthier data clean` does with a row in which this is found: `drop` or `repair` it, or `keep` it."""
    actions: dict[str, Action] = {}
    """Another action for some of the things that it finds."""
    allowed: float | None = Field(None, ge=0.0, le=1.0)
    """The share of rows in which this may be found in an audit; none by default, any where the action is `keep`."""

    @model_validator(mode="after")
    def _possible(self) -> Check:
        possible, known = get_args(type(self).model_fields["action"].annotation), self.finds()
        for what, action in self.actions.items():
            if known and what not in known:
                meant = nearest(what, known)
                hint = f"; did you mean {meant!r}?" if meant else ""
                raise ValueError(f"actions: {self.kind} finds no {what!r}{hint} (known: {', '.join(known)})")
            if action not in possible or (action == "repair" and what in self.beyond_repair):
                raise ValueError(f"actions.{what}: {action!r} cannot be done; known are {', '.join(possible)}")
        return self

    def finds(self) -> tuple[str, ...]:
        """All that it can find; without any, names are not checked."""
        return self.whats

    def action_of(self, what: str) -> Action:
        """What is done about one of the things that it finds."""
        action = self.actions.get(what, self.action)
        return "drop" if action == "repair" and what in self.beyond_repair else action

    def limit(self) -> float:
        """The share of rows that an audit accepts."""
        return (1.0 if self.action == "keep" else 0.0) if self.allowed is None else self.allowed

    def wanting(self) -> str | None:
        """What a recipe has to say before rows can be cleaned by it, beyond its form; None where nothing is missing."""
        return None

    def decides(self) -> bool:
        """Whether cleaning needs what it says of the whole set.

        What it decides has to be the same once its rows are gone, or cleaning twice would remove more: thresholds that
        depend on the data are for audits, and stand in a recipe as numbers.
        """
        return self.action != "keep" and self.gatherer() is not None

    def inputs(self) -> list:
        """JSON of what the files are that it reads by itself: a run that was begun with others is another run."""
        return []

    def prepared(self, given: Mapping[str, str]) -> Check:
        """The check as it works in a process: what has to be read or compiled first is kept on it.

        `given` has what the recipe says for all checks: the name `model`, and `tokenizer`, as JSON of `tokenizers`.
        """
        return self

    # one row

    def look(self, view: View) -> Sequence[Finding]:
        """What is found in this row by itself."""
        return ()

    def repair(self, view: View, findings: Sequence[Finding]) -> dict[int, str]:
        """Other texts by their place in `view.texts`; a row in which nothing could be changed is dropped."""
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
