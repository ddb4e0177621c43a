"""Rows that say nearly the same as another: MinHash, and true Jaccard similarity of what it finds."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ..clusters import Clusters
from ..lsh import Banded, Sets, candidates, clustered, kept, unite_equal
from ..minhash import banded, bands_for, most_differing, shingles, signatures, sketches
from ..normal import normal
from ..views import View
from .check import Again, Check, Decision, Gathered, Gatherer

LABELS = ("label", "labels", "tags", "ner_tags")  # the same text with another label is no copy
LEFT_OUT = "system"  # the role that rows share without being alike
TOGETHER = 1 << 16  # characters that are worked on at a time: their numbers fit into a core's cache
SAME, NEAR = "same", "near"


class NearDuplicates(Check):
    """Rows are compared as sets of shingles of their texts, without case, marks and system turns.

    Rows of which each is at least `threshold` like the next hang together; one of them stays. Two rows with different
    labels, or whose chosen and rejected answers are the other way round, are never alike. Only told of by default: in
    rows made from templates each may be meant.
    """

    whats: ClassVar = (SAME, NEAR)

    kind: Literal["near_duplicates"] = "near_duplicates"
    action: Literal["drop", "keep"] = "keep"
    threshold: float = Field(0.5, gt=0.0, le=1.0)
    """Jaccard similarity from which two rows are alike: shared shingles over all shingles of both."""
    unit: Literal["characters", "words"] = "characters"
    """What a shingle is made of."""
    size: int = Field(5, ge=1, le=64)
    """How many units are a shingle."""
    shortest: int = Field(50, ge=1)
    """Rows of fewer shingles are only compared as a whole: in few words each one counts."""
    keep: Literal["first", "longest"] = "first"
    """Which of rows that hang together stays."""
    hashes: int = Field(256, ge=64, le=1024, multiple_of=64)
    """Values of a signature: more find more of what is just above the threshold, and take longer."""
    recall: float = Field(0.95, gt=0.0, lt=1.0)
    """The least probability with which a pair exactly at the threshold is found; above, it rises steeply."""

    @model_validator(mode="after")
    def _findable(self) -> NearDuplicates:
        if not bands_for(self.threshold, self.hashes, self.recall)[0]:
            raise ValueError(
                f"hashes={self.hashes} do not find pairs at threshold={self.threshold} with recall={self.recall}: "
                "take more of them, or a higher threshold"
            )
        return self

    def gatherer(self) -> Gatherer:
        return _Bands(self)

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        whole = _Whole(gathered)
        clusters = Clusters(len(whole.rows))
        unite_equal(clusters, whole.texts)
        first = clusters.all().copy()
        bands, _ = bands_for(self.threshold, self.hashes, self.recall)
        of = Banded(whole.band, bands, whole.sketches, most_differing(self.threshold, self.hashes))
        long = (first == np.arange(len(first))) & (whole.sizes >= self.shortest)
        pool = candidates(of, np.flatnonzero(long))
        sets = self._sets(whole.rows, pool, again)

        def stays() -> np.ndarray:
            return kept(clusters, whole.sizes, self.keep == "longest")

        clustered(clusters, of, pool, sets, self.threshold, stays)
        return self._decision(whole, first, stays(), sets)

    def _decision(self, whole: _Whole, first: np.ndarray, best: np.ndarray, sets: Sets) -> Decision:
        here = np.arange(len(best))
        copies = first != here
        gone = copies | (best != here)
        others = np.where(copies, first, best)[gone]
        alike = np.ones(len(others))
        near = ~copies[gone]
        alike[near] = sets.jaccard(np.flatnonzero(gone)[near], others[near])
        told = [
            (SAME, "the same as row {other} but for case, marks and spacing"),
            (NEAR, "{number:.0%} like row {other}"),
            (NEAR, "linked to row {other} by rows in between, each like the next; itself {number:.0%} like it"),
        ]
        codes = np.where(near, np.where(alike >= self.threshold, 1, 2), 0).astype(np.uint8)
        sizes = np.unique(best, return_counts=True)[1]
        summary = {
            "rows": int(gone.sum()), SAME: int((~near).sum()), NEAR: int(near.sum()),
            "clusters": int((sizes > 1).sum()), "largest": int(sizes.max(initial=0)), "compared": len(sets.rows),
        }  # fmt: skip
        return Decision(whole.rows[gone], told, codes, whole.rows[others], alike, summary)

    def _sets(self, rows: np.ndarray, wanted: np.ndarray, again: Again) -> Sets:
        """The shingles of the rows at the places `wanted`, which are read once more."""
        texts = Texts(self)
        numbers = iter(rows[wanted].tolist())
        number = next(numbers, None)
        with Sets(wanted) as sets:
            for at, view in again() if number is not None else ():
                if at == number:
                    texts.add(view)
                    if texts.full():
                        sets.add(*texts.take().sets())
                    number = next(numbers, None)
                    if number is None:
                        break
            if texts.texts:
                sets.add(*texts.take().sets())
        return sets


class _Whole:
    """What was gathered of all pieces, as one."""

    def __init__(self, gathered: Sequence[Gathered]):
        self.rows = np.concatenate([g.arrays["rows"].astype(np.int64) + g.first for g in gathered])
        self.texts = np.concatenate([g.arrays["texts"] for g in gathered])
        self.sizes = np.concatenate([g.arrays["sizes"] for g in gathered])
        self.sketches = np.concatenate([g.arrays["sketches"] for g in gathered])
        self.bands = [g.arrays["bands"] for g in gathered]

    def band(self, which: int) -> np.ndarray:
        return np.concatenate([bands[which] for bands in self.bands])


class Texts:
    """Normal texts of rows that wait to be worked on together."""

    def __init__(self, check: NearDuplicates):
        self.unit, self.size = check.unit, check.size
        self._clear()

    def _clear(self) -> None:
        self.texts: list[str] = []
        self.apart: list[tuple[int, int, int]] = []
        self.characters = 0

    def add(self, view: View) -> str:
        """The row's text, "" of one that has none and is passed over."""
        parts, at = [], 0
        for text in view.texts:
            if text.role == LEFT_OUT or not (part := normal(text.text)):
                continue
            if text.role == "rejected":
                self.apart.append((len(self.texts), at, at + len(part)))
            parts.append(part)
            at += len(part) + 1
        if parts:
            self.texts.append(" ".join(parts))
            self.characters += at
            return self.texts[-1]
        return ""

    def full(self) -> bool:
        return self.characters >= TOGETHER

    def take(self):
        made = shingles(self.texts, self.unit, self.size, self.apart)
        self._clear()
        return made


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


class _Bands(Gatherer):
    def __init__(self, check: NearDuplicates):
        self.check = check
        self.banding = bands_for(check.threshold, check.hashes, check.recall)
        self.waiting = Texts(check)
        self.rows, self.hashes = array("I"), bytearray()
        self.labels: list[int] = []
        self.bands: list[np.ndarray] = []
        self.sketches: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = []

    def add(self, number: int, view: View) -> None:
        text = self.waiting.add(view)
        if not text:
            return
        label = "".join(f"\x1d{key}\x1f{view.values[key]!r}" for key in LABELS if key in view.values)
        marks = [span[1:] for span in self.waiting.apart if span[0] == len(self.waiting.texts) - 1]
        whole = f"{text}\x1e{marks}{label}" if marks or label else text
        self.rows.append(number)
        self.hashes += _digest(whole)
        self.labels.append(int.from_bytes(_digest(label)[:4]) if label else 0)
        if self.waiting.full():
            self._work()

    def _work(self) -> None:
        of = self.waiting.take()
        self.sizes.append(of.sizes().astype(np.uint32))
        signature = signatures(of, self.check.hashes)
        self.bands.append(banded(signature, *self.banding) ^ np.array(self.labels, np.uint32))
        self.sketches.append(sketches(signature))
        self.labels = []

    def arrays(self) -> Mapping[str, np.ndarray]:  # type: ignore[override]
        if self.waiting.texts:
            self._work()
        none = np.zeros((self.banding[0], 0), np.uint32)
        return {
            "rows": np.array(self.rows, np.uint32),
            "texts": np.frombuffer(bytes(self.hashes), np.uint64),
            "sizes": np.concatenate([np.zeros(0, np.uint32), *self.sizes]),
            "bands": np.concatenate([none, *self.bands], axis=1),
            "sketches": np.concatenate([np.zeros((0, self.check.hashes // 64), np.uint64), *self.sketches]),
        }
