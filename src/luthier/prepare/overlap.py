"""Which rows of evaluation sets a row shares runs of words with, or says whole.

Runs of 13 words, as for GPT-3 (https://arxiv.org/abs/2005.14165, appendix C); counted as a share of the evaluation row,
so that a long document that holds a short question whole is found. Words are `normal.normal`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .minhash import BASE, rolled
from .normal import normal

BITS = 26  # of a table of marks, 8 MiB, that most runs are turned away by


class Match(NamedTuple):
    """What a row has of an evaluation row."""

    row: int  # which of the index
    whole: bool  # all of the evaluation row or a text of it is all of the row or a text of it
    share: float  # of the evaluation row's runs of words; 1 of a whole
    words: Sequence[str]  # the first of these runs, or the whole text
    text: int  # which of the texts it stands in, -1 for all of them together


class Index:
    """The runs of `size` words of evaluation rows, and their texts as a whole.

    A text of fewer words has no run: it is found whole, from `least` words on, or where all of a row is the same. Runs
    that more than `common` rows have are the form in which questions are put, and no sign of any row. Numbers come from
    Python's `hash` of words: they hold for one process. Rows of less than `fewest` runs are only found whole.
    """

    def __init__(self, rows: Iterable[Sequence[str]], size: int, least: int, common: int, fewest: int = 1):
        self.size, self.least = size, least
        self.wholes: dict[str, int] = {}  # all of a row, or one text -> the first row that has it
        runs, owners = [], []
        self.count = 0
        for row, texts in enumerate(rows):
            self.count += 1
            normals = [text for given in texts if (text := normal(given))]
            for text in (*([" ".join(normals)] if normals else []), *(t for t in normals if t.count(" ") + 1 >= least)):
                self.wholes.setdefault(text, row)
            found = [self.runs(text.split(" ")) for text in normals]
            mine = np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)
            mine = mine if len(mine) >= fewest else mine[:0]
            runs.append(mine)
            owners.append(np.full(len(mine), row, np.int32))
        none = np.zeros(0, np.uint64), np.zeros(0, np.int32)
        self._keep(np.concatenate([none[0], *runs]), np.concatenate([none[1], *owners]), common)

    def _keep(self, runs: np.ndarray, owners: np.ndarray, common: int) -> None:
        order = np.argsort(runs, kind="stable")
        runs, owners = runs[order], owners[order]
        _, which, counts = np.unique(runs, return_inverse=True, return_counts=True)
        telling = counts[which] <= common if len(runs) else np.zeros(0, bool)
        self.hashes, self.owners = runs[telling], owners[telling]
        self.totals = np.bincount(self.owners, minlength=self.count)
        self.marks = np.zeros(1 << BITS - 3, np.uint8)
        places = (self.hashes >> np.uint64(64 - BITS)).astype(np.int64)
        np.bitwise_or.at(self.marks, places >> 3, (1 << (places & 7)).astype(np.uint8))

    def runs(self, words: Sequence[str]) -> np.ndarray:
        """[W - size + 1] uint64."""
        if len(words) < self.size:
            return np.zeros(0, np.uint64)
        hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        made = rolled(hashes, self.size)
        made *= np.uint64(BASE)  # the highest bits depend on all
        return made

    def matches(self, texts: Sequence[str], share: float) -> list[Match]:
        """The evaluation rows of which these texts have at least this share, the largest first, each once."""
        normals = [normal(text) for text in texts]
        best: dict[int, Match] = {}
        alone = [(at, text) for at, text in enumerate(normals) if text.count(" ") + 1 >= self.least]
        for at, text in [(-1, " ".join(text for text in normals if text)), *alone]:
            if (row := self.wholes.get(text)) is not None and row not in best:
                best[row] = Match(row, True, 1.0, text.split(" "), at)
        hits: dict[int, dict[int, tuple[int, int]]] = {}  # row -> run -> (text, place) where it first stands
        for at, text in enumerate(normals):
            if text.count(" ") + 1 >= self.size:
                self._hits(at, self.runs(text.split(" ")), hits)
        for row, found in hits.items():
            part = len(found) / self.totals[row]
            if part >= share and (row not in best or best[row].share < part):
                at, place = min(found.values())
                best[row] = Match(row, False, float(part), normals[at].split(" ")[place : place + self.size], at)
        return sorted(best.values(), key=lambda match: (not match.whole, -match.share, match.row))

    def _hits(self, at: int, runs: np.ndarray, hits: dict[int, dict[int, tuple[int, int]]]) -> None:
        if not len(self.hashes):
            return
        places = runs >> np.uint64(64 - BITS)
        marked = self.marks[places >> np.uint64(3)] >> (places & np.uint64(7)).astype(np.uint8) & 1
        if not marked.any():
            return
        for place in np.flatnonzero(marked).tolist():
            low, high = (int(np.searchsorted(self.hashes, runs[place], side)) for side in ("left", "right"))
            for row in self.owners[low:high].tolist():
                hits.setdefault(row, {}).setdefault(int(runs[place]), (at, place))
