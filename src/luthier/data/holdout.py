"""Which rows are held out, told by their numbers alone, and the texts of all others: what a tokenizer may see."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import DataError
from . import Data, sources
from .formats import FORMATS, BadRow, recognise, renamed


def drawn(rows: int, validation: float | int, seed: int) -> set[int]:
    """The numbers of the held-out ones of `rows` rows, good or bad: a share below 1, or so many, drawn by the seed.

    Whether a row is bad can depend on the tokenizer. Its number cannot, so that the split is known before there is one.
    """
    count = round(validation * rows) if isinstance(validation, float) else validation
    if not 0 < count < rows:
        raise DataError(
            f"data.validation={validation} takes {count} of {rows} rows: give a share below 1 or a number that "
            "leaves rows on both sides"
        )
    return set(np.random.default_rng([seed, 1 << 32]).permutation(rows)[:count].tolist())


def training_texts(data: Data) -> Iterator[str]:
    """The texts of the rows that are learnt, one after another, never those of held-out rows; bad rows have none."""
    held_out: set[int] = set()
    if data.validation is not None and not isinstance(data.validation, str):
        rows = sum(1 for _ in sources.read(data.train, data.subset, data.split))
        held_out = drawn(rows, data.validation, data.seed)
    form = None if data.format == "auto" else FORMATS[data.format]
    used = 0
    for row in sources.read(data.train, data.subset, data.split):
        if row.number in held_out:
            continue
        if data.limit is not None and used == data.limit:
            return
        form = form or recognise(row.values, row.place, data.columns)
        values = renamed(row.values, data.columns)
        if any(key not in values for key in form.keys):
            continue
        try:
            messages = form.convert(values).messages
        except BadRow:
            continue
        used += 1
        yield from (message["content"] for message in messages if message["content"])
