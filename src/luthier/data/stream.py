"""The steps of a run as lists of documents: a function of lengths, seed and batch size, so a step is a position."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import overload

import numpy as np

from ..errors import DataError
from . import mixture, packing

Step = list[list[int]]  # rows of documents


class Plan(Sequence[Step]):
    """Steps in three flat arrays, 4 bytes a document: documents, where rows of them end, where steps of rows end."""

    def __init__(self, steps: Iterable[Step], lengths: Sequence[int], fingerprint: str = ""):
        self.documents, self.rows, self.steps = array("i"), array("q", [0]), array("q", [0])
        for step in steps:
            for row in step:
                self.documents.extend(row)
                self.rows.append(len(self.documents))
            self.steps.append(len(self.rows) - 1)
        self.lengths, self.fingerprint = lengths, fingerprint

    def __len__(self) -> int:
        return len(self.steps) - 1

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        rows = range(self.steps[index], self.steps[index + 1])
        return [self.documents[self.rows[r] : self.rows[r + 1]].tolist() for r in rows]

    def tokens(self, steps: int | None = None) -> int:
        """Tokens that the network runs in the first so many steps, in all of them without a number."""
        stop = self.documents_until(len(self) if steps is None else steps)
        chosen = np.frombuffer(self.documents, np.int32)[:stop] if stop else np.zeros(0, np.int32)
        return int(np.asarray(self.lengths)[chosen].sum(dtype=np.int64))

    def documents_until(self, step: int) -> int:
        """Documents in the steps before this one."""
        return self.rows[self.steps[step]]

    def totals(self, steps: int | None = None) -> dict:
        """Documents that there are, tokens that are run in the first so many steps."""
        return {"rows": len(self.lengths), "tokens": self.tokens(steps)}

    def digest(self) -> str:
        """Tells one plan from another."""
        made = hashlib.sha256()
        for part in (self.documents, self.rows, self.steps):
            made.update(part)
        return made.hexdigest()[:16]

    # ------------------------------------------------------------------ what the loop asks of any steps
    def position(self, step: int) -> dict:
        """What must be the same for `step` to be at the same place of the data."""
        return {"rows": self.fingerprint, "plan": self.digest()}

    def resume(self, position: dict, step: int) -> str | None:
        """Go to where a checkpoint stands; what is no longer as it was then, if something is."""
        here = self.position(step)
        if position == here:
            return None
        return "rows" if position.get("rows") != here["rows"] else "order of the rows"

    def known(self, step: int) -> bool:
        """Whether the documents of a step can be made before the one before it is taken."""
        return True

    def close(self) -> None:
        """Nothing is open."""


def plan(
    lengths: Sequence[int], *, examples: int | None, tokens: int | None, micro_tokens: int, pack: bool, seed: int,
    epochs: int | None, max_steps: int | None, sizes: Sequence[int] = (), weights: Sequence[float] | None = None,
    fingerprint: str = "",
) -> Plan:  # fmt: skip
    """All steps. With `examples` a step is so many documents, with `tokens` so many slots of rows of `micro_tokens`.

    The last one may be smaller: every document is learnt. With `weights`, documents are those of sources of so many
    `sizes`, drawn in these shares.
    """
    epochs = None if max_steps is not None else epochs
    if weights is not None:
        passes = mixture.epochs_of(sizes, weights, seed, epochs)
    else:
        passes = packing.passes(len(lengths), seed, epochs)
    steps = laid_out(passes, lengths, examples=examples, tokens=tokens, micro_tokens=micro_tokens, pack=pack)
    made = Plan(islice(steps, max_steps), lengths, fingerprint)
    if not len(made):
        raise DataError("the data gives no training step")
    return made


def laid_out(
    passes: Iterable[Iterable[int]], lengths: Sequence[int], *, examples: int | None, tokens: int | None,
    micro_tokens: int, pack: bool,
) -> Iterator[Step]:  # fmt: skip
    """The steps of documents that come in this order, pass after pass."""
    source = chain.from_iterable(passes)
    if examples is not None:
        groups = packing.grouped(source, examples)
        return (_rows(group, lengths, micro_tokens, pack) for group in groups)
    assert tokens is not None
    if pack:
        rows = packing.best_fit_passes(passes, lengths, micro_tokens)
    else:
        rows = _consecutive(source, lengths, micro_tokens)
    return _chunks(rows, tokens // micro_tokens)


def _rows(group: list[int], lengths: Sequence[int], micro_tokens: int, pack: bool) -> Step:
    return list(packing.best_fit(group, lengths, micro_tokens) if pack else _consecutive(group, lengths, micro_tokens))


def _consecutive(documents, lengths: Sequence[int], micro_tokens: int):
    """Rows of consecutive documents whose padded rectangle has at most `micro_tokens` slots."""
    row: list[int] = []
    longest = 0
    for document in documents:
        longest = max(longest, lengths[document])
        if row and longest * (len(row) + 1) > micro_tokens:
            yield row
            row, longest = [], lengths[document]
        row.append(document)
    if row:
        yield row


def _chunks(rows, size: int):
    """Groups of `size` rows; the last may be smaller, as the loss is divided by what is learnt."""
    step: Step = []
    for row in rows:
        step.append(row)
        if len(step) == size:
            yield step
            step = []
    if step:
        yield step


def digest(steps: Plan) -> str:
    """Tells one plan from another."""
    return steps.digest()
