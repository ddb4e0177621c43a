"""The steps of a run as lists of documents: a function of lengths, seed and batch size, so a step is a position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice

from ..errors import DataError
from . import packing

Step = list[list[int]]  # rows of documents


def plan(
    lengths: Sequence[int], *, examples: int | None, tokens: int | None, micro_tokens: int, pack: bool, seed: int,
    epochs: int | None, max_steps: int | None,
) -> list[Step]:  # fmt: skip
    """All steps. With `examples` a step is so many documents, with `tokens` so many slots of rows of `micro_tokens`."""
    source = packing.endless(len(lengths), seed, None if max_steps is not None else epochs)
    if examples is not None:
        groups = packing.grouped(source, examples)
        steps = (_rows(group, lengths, micro_tokens, pack) for group in groups)
    else:
        assert tokens is not None
        rows = packing.best_fit(source, lengths, micro_tokens) if pack else _consecutive(source, lengths, micro_tokens)
        steps = _chunks(rows, tokens // micro_tokens)
    made = list(islice(steps, max_steps)) if max_steps is not None else list(steps)
    if not made:
        raise DataError("the data gives no training step")
    return made


def _rows(group: list[int], lengths: Sequence[int], micro_tokens: int, pack: bool) -> Step:
    return list(packing.best_fit(group, lengths, micro_tokens) if pack else _consecutive(group, lengths, micro_tokens))


def _consecutive(documents, lengths: Sequence[int], micro_tokens: int):
    """Rows of consecutive documents whose padded rectangle has at most `micro_tokens` slots."""
    row: list[int] = []
    for document in documents:
        longest = max(lengths[d] for d in [*row, document])
        if row and longest * (len(row) + 1) > micro_tokens:
            yield row
            row = []
        row.append(document)
    if row:
        yield row


def _chunks(rows, size: int):
    step: Step = []
    for row in rows:
        step.append(row)
        if len(step) == size:
            yield step
            step = []
    if step:
        yield step


def digest(steps: Sequence[Step]) -> str:
    """Tells one plan from another."""
    made = hashlib.sha256()
    for step in steps:
        made.update(repr(step).encode())
    return made.hexdigest()[:16]
