"""Which rows are held out, told by their numbers alone, and the texts of all others: what a tokenizer may see."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

import numpy as np

from ..errors import DataError
from . import Data, Source, sources
from .conversations import BadRow, Conversation
from .formats import FORMATS, converted, first_recognised

PARENT = "_parent"  # the key of a row that was made of another one, under which it names it
FIRST = 1000  # rows of a source that are looked at


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


def refuse_families(data: Data) -> None:
    """DataError where a share is held out of rows of which some were made of others (`luthier data augment`).

    New rows stand behind their parents, so the first rows tell.
    """
    if data.validation is None or isinstance(data.validation, str):
        return
    for entry in data.sources():
        paths = [entry.path] if isinstance(entry.path, str) else entry.path
        if any(sources.files_of(path, entry.split or "train") is None for path in paths):  # on the hub
            continue
        made = next((row for row in islice(_rows(data, entry), FIRST) if PARENT in (row.values or {})), None)
        if made is not None:
            raise DataError(
                f"data.validation={data.validation}: {made.place} was made of another row (it has {PARENT}), and rows "
                "held out by chance would have copies among those that are learnt. Split the rows before they are "
                "augmented, or with `luthier data split`, which keeps them together, and give data.validation a file"
            )


def training_texts(data: Data, kind: str = "text") -> Iterator[str]:
    """The texts of the rows that are learnt."""
    for conversation in training_rows(data, kind):
        yield from (message["content"] for message in conversation.messages if message["content"])


def training_rows(data: Data, kind: str = "text") -> Iterator[Conversation]:
    """The rows that are learnt, source after source, never held-out ones; bad rows are passed over."""
    held_out: set[int] = set()
    if data.validation is not None and not isinstance(data.validation, str):
        count = sum(1 for entry in data.sources() for _ in _rows(data, entry))
        held_out = drawn(count, data.validation, data.seed)
    before, used = 0, 0
    for entry in data.sources():
        of_source, number = 0, -1
        rows = _rows(data, entry)
        form, taken = None, []
        if entry.format in (None, "auto"):
            form, taken = first_recognised(rows, entry.columns or {}, kind)
        form = form or FORMATS[str(entry.format)]
        for number, row in enumerate(chain(taken, rows)):
            if before + number in held_out or (entry.limit is not None and of_source == entry.limit):
                continue
            if data.limit is not None and used == data.limit:
                return
            try:
                conversation = converted(row, form, entry.columns or {})
            except BadRow:
                continue
            of_source, used = of_source + 1, used + 1
            yield conversation
        before += number + 1


def _rows(data: Data, entry: Source) -> Iterator[sources.Row]:
    return sources.read(entry.path, entry.subset, entry.split or "train", sample_by=data.sample_by)
