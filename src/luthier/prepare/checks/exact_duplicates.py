"""Rows that say the same as an earlier one, by a hash of all their texts, roles and labels."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import ClassVar, Literal

import numpy as np

from ..views import View
from .check import Again, Check, Decision, Gathered, Gatherer

_LABELS = (
    "label",
    "labels",
    "tags",
    "ner_tags",
    "input_ids",
)  # what is said of a text: the same text with another is no copy
BYTES = 16  # of a hash: among ten million rows two that differ agree with a chance of 1e-25


class ExactDuplicates(Check):
    """The first of equal rows stays."""

    whats: ClassVar = ("duplicate",)

    kind: Literal["exact_duplicates"] = "exact_duplicates"
    action: Literal["drop", "keep"] = "drop"
    ignore: Literal["nothing", "case_and_space"] = "nothing"
    """Differences that do not count: capital letters, and how words are parted."""

    def gatherer(self) -> Gatherer:
        return _Hashes(self.ignore == "case_and_space")

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        rows = np.concatenate([g.arrays["rows"].astype(np.int64) + g.first for g in gathered])
        hashes = np.concatenate([np.asarray(g.arrays["hashes"]) for g in gathered])
        found, first = repeated(hashes, rows)
        groups = len(np.unique(first))
        summary = {"rows": len(found), "groups": groups, "distinct": len(rows) - len(found)}
        return Decision(found, [("duplicate", "the same as row {other}")], others=first, summary=summary)


def repeated(hashes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of `hashes` [N, 2] uint64: the rows whose hash an earlier row has, rising, and for each the first such row."""
    if not len(rows):
        return rows, rows
    order = np.lexsort((rows, hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = rows[order][np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    found, first = rows[order][~new], first[~new]
    rising = np.argsort(found, kind="stable")
    return found[rising], first[rising]


class _Hashes(Gatherer):
    def __init__(self, loose: bool):
        self.loose = loose
        self.hashes, self.rows = bytearray(), array("i")

    def add(self, number: int, view: View) -> None:
        text = view.joined()
        if self.loose:
            text = " ".join(text.lower().split())
        for key in _LABELS:
            if key in view.values:
                text += f"\x1d{key}\x1f{view.values[key]!r}"
        self.hashes += blake2b(text.encode("utf-8", "surrogatepass"), digest_size=BYTES).digest()
        self.rows.append(number)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "hashes": np.frombuffer(bytes(self.hashes), np.uint64).reshape(-1, 2),
            "rows": np.array(self.rows, np.int64),
        }
