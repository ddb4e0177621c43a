"""Rows that stand in an evaluation set too: whole, in runs of 13 words, or with some words changed."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...data import sources
from ...errors import DataError
from ..overlap import Index, Match
from ..views import View, view
from .check import Again, Check, Decision, Finding, Gathered, Gatherer, Span

SHOWN = 3  # evaluation rows that are told of a row
SHORT = 5  # words in a row of which a near copy has many
FEWEST = 12  # of these that an evaluation row has at least: in few a common phrase is a large share
WHOLE, RUNS, NEAR = "whole", "words", "near"


class Overlap(Check):
    """Looks for rows of evaluation sets, and of benchmarks' local copies, in those of training; system turns aside."""

    whats: ClassVar = (WHOLE, RUNS, NEAR)

    kind: Literal["overlap"] = "overlap"
    action: Literal["drop", "keep"] = "drop"
    against: dict[str, str] = {}
    """Evaluation sets by the names under which they are told: files, folders or patterns that training could read."""
    split: str = "test"
    """Which split of these, where a folder has several."""
    words: int = Field(13, ge=2, le=64)
    """How many words in a row are no chance."""
    share: float = Field(0.1, gt=0.0, le=1.0)
    """From which share of an evaluation row's runs of words a row is found."""
    near: float | None = Field(0.4, gt=0.0, le=1.0)
    """From which share of an evaluation row's runs of five words a row is a near copy of it; null looks for none."""
    least: int = Field(8, ge=1)
    """Words that a single turn or column has at least, to be found whole; a whole row is found however short it is."""
    common: int = Field(10, ge=1)
    """Runs of words that more evaluation rows have than this are the wording of the task, and count for none."""

    _benchmarks: Any = ()
    _last: Any = None

    def wanting(self) -> str | None:
        problems = [f"against.{name}: {text}" for name, path in self.against.items() if (text := sources.missing(path))]
        return "; ".join(problems) or None

    def prepared(self, given: Mapping[str, str]) -> Check:
        made, near = self.model_copy(), self.near is not None and self.words > SHORT
        made._benchmarks = tuple(
            _benchmark(
                name, path, self.split, self.words, self.least, self.common, near, _state(name, path, self.split)
            )
            for name, path in self.against.items()
        )
        return made

    def inputs(self) -> list:
        return [_state(name, path, self.split) for name, path in self.against.items()]

    def decides(self) -> bool:
        return False  # what is gathered is only counted

    def look(self, view: View) -> Sequence[Finding]:
        return [_finding(view, benchmark, size, found) for benchmark, size, found in self.matches(view) if found]

    def matches(self, view: View) -> list[tuple[Benchmark, int, list[Match]]]:
        """Of each benchmark what the row has of it, in runs of so many words; what was asked last is remembered."""
        if self._last is None or self._last[0] is not view:
            texts = [text.text for text in view.texts if text.role != "system"]
            self._last = view, [(benchmark, *self._matches(benchmark, texts)) for benchmark in self._benchmarks]
        return self._last[1]

    def _matches(self, benchmark: Benchmark, texts: Sequence[str]) -> tuple[int, list[Match]]:
        found = benchmark.index.matches(texts, self.share)
        if found or benchmark.short is None or self.near is None:
            return self.words, found
        return SHORT, benchmark.short.matches(texts, self.near)

    def gatherer(self) -> Gatherer | None:
        return _Seen(self) if self.against else None

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        summary = {}
        for place, benchmark in enumerate(self._benchmarks):
            rows = np.unique(np.concatenate([g.arrays[f"{place}"] for g in gathered]))
            summary[benchmark.name] = {"rows": benchmark.index.count, "in_training": len(rows),
                                       "places": [benchmark.places[row] for row in rows[:50].tolist()]}  # fmt: skip
        return Decision(summary={"against": summary})


class Benchmark:
    """An evaluation set with its index, and where its rows stand."""

    def __init__(self, name: str, path: str, split: str, words: int, least: int, common: int, near: bool):
        self.name = name
        self.places: list[str] = []
        rows = [*self._rows(path, split)]
        self.index = Index(rows, words, least, common)
        self.short = Index(rows, SHORT, least, common, FEWEST) if near else None

    def _rows(self, path: str, split: str) -> Iterator[list[str]]:
        for row in sources.read(path, split=split):
            if row.fault is not None:
                raise DataError(f"checks.overlap.against.{self.name}: {row.place}: {row.fault}")
            self.places.append(row.place)
            yield [text.text for text in view(row.values).texts if text.role != "system"]


@lru_cache(maxsize=64)
def _benchmark(
    name: str, path: str, split: str, words: int, least: int, common: int, near: bool, state: tuple
) -> Benchmark:
    """Read once in a process, as long as its files stay what they are."""
    return Benchmark(name, path, split, words, least, common, near)


def _state(name: str, path: str, split: str) -> tuple:
    if problem := sources.missing(path):
        raise DataError(f"checks.overlap.against.{name}: {problem}")
    told = [(str(file), os.stat(file)) for file in sources.files_of(path, split) or ()]
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in told)


def _finding(seen: View, benchmark: Benchmark, size: int, found: Sequence[Match]) -> Finding:
    best = found[0]
    places = ", ".join(benchmark.places[match.row] for match in found[:SHOWN])
    more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    words = " ".join(best.words[:size])
    if best.whole:
        detail = f"{benchmark.name}: all of {places}{more}: {words!r}"
    else:
        detail = f"{benchmark.name}: {best.share:.0%} of {places}{more}, in {size} words such as {words!r}"
    return Finding(WHOLE if best.whole else NEAR if size != benchmark.index.size else RUNS, detail, _spans(seen, best))


def _spans(seen: View, match: Match) -> tuple[Span, ...]:
    """Where the words stand in the row as it is; nowhere where normal forms have no such place."""
    texts = [at for at, text in enumerate(seen.texts) if text.role != "system"]
    if match.text < 0:
        return tuple(Span(at, 0, len(seen.texts[at].text)) for at in texts)
    at = texts[match.text]
    pattern = r"[\W_]+".join(re.escape(word) for word in match.words)
    found = re.search(pattern, seen.texts[at].text, re.IGNORECASE)
    return (Span(at, found.start(), found.end()),) if found else ()


class _Seen(Gatherer):
    """Which rows of each benchmark were found."""

    def __init__(self, check: Overlap):
        self.check = check
        self.rows = [array("i") for _ in check._benchmarks]

    def add(self, number: int, view: View) -> None:
        for rows, (*_, found) in zip(self.rows, self.check.matches(view)):
            rows.extend(match.row for match in found)

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"{place}": np.unique(np.array(rows, np.int32)) for place, rows in enumerate(self.rows)}
