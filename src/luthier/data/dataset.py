"""A data set as tokens: rows read, recognised, rendered, checked and split; what is wrong is counted, never dropped."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from ..batch import Document
from ..errors import DataError
from ..files import write_atomically
from . import Data, sources
from .formats import FORMATS, BadRow, Conversation, converted, first_recognised
from .masks import Renderer

REMEDIES = {
    "format": "mend the rows, or name their columns with data.columns",
    "role_order": "mend the order of the turns",
    "empty_answer": "remove the rows, or give them an answer",
    "no_trained_token": "remove the rows, or give them an assistant turn",
    "truncated": "raise data.max_length, or shorten the rows",
    "template": "use another model.chat_template, or mend the rows",
    "special_token": "remove the token from the text: it would be read as the end of a turn",
}
CHUNK = 1000


@dataclass(frozen=True)
class Fault:
    row: int
    place: str
    kind: str
    detail: str


@dataclass
class Dataset:
    """Documents in the order of their files, the conversations that they came from, and the bad rows."""

    documents: list[Document]
    conversations: list[Conversation]
    faults: list[Fault]
    found: str  # the format, and how it was told
    source: str
    renderer: Renderer
    _lengths: list[int] | None = field(default=None, repr=False)

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each document are run, which is what packing goes by."""
        if self._lengths is None:
            self._lengths = [d.inputs for d in self.documents]
        return self._lengths

    @property
    def tokens(self) -> int:
        return sum(len(d.tokens) for d in self.documents)

    @property
    def rows(self) -> int:
        """Rows that were read, good and bad; a row can be several documents."""
        return len({d.row for d in self.documents}) + len(self.faults)

    @property
    def trained_tokens(self) -> int:
        return int(sum(np.count_nonzero(d.weights) for d in self.documents))

    def __len__(self) -> int:
        return len(self.documents)

    def fingerprint(self) -> str:
        """Changes with any token or weight of any row."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(len(document.tokens).to_bytes(8, "little"))
            digest.update(document.tokens.tobytes())
            digest.update(document.weights.tobytes())
        return digest.hexdigest()[:16]

    def subset(self, indices: Sequence[int]) -> Dataset:
        return Dataset(
            [self.documents[i] for i in indices], [self.conversations[i] for i in indices], [], self.found, self.source,
            self.renderer,
        )  # fmt: skip


def load(data: Data, source: str | list[str], renderer: Renderer) -> Dataset:
    """Read and render all rows of a source; bad ones are collected, whatever `on_bad_row` says."""
    rows, taken = sources.read(source, data.subset, data.split, sample_by=data.sample_by), []
    form = None if data.format == "auto" else FORMATS[data.format]
    if form is None:
        form, taken = first_recognised(rows, data.columns)
    made = Dataset([], [], [], "", source if isinstance(source, str) else ", ".join(source), renderer)
    waiting: list[tuple[sources.Row, Conversation]] = []

    def flush() -> None:
        rendered = []
        for row, conversation in waiting:
            try:
                rendered.append((row, conversation, renderer.render(conversation)))
            except BadRow as fault:
                made.faults.append(Fault(row.number, row.place, fault.kind, fault.detail))
        results = renderer.documents([(row.number, text) for row, _, text in rendered])
        for (row, conversation, _), result in zip(rendered, results):
            if isinstance(result, BadRow):
                made.faults.append(Fault(row.number, row.place, result.kind, result.detail))
            else:  # several of a long plain text
                made.documents.extend(result)
                made.conversations.extend([conversation] * len(result))
        waiting.clear()

    for row in chain(taken, rows):
        try:
            waiting.append((row, converted(row, form, data.columns)))
        except BadRow as fault:
            made.faults.append(Fault(row.number, row.place, fault.kind, fault.detail))
        if len(waiting) >= CHUNK:
            flush()
    flush()
    told = "as data.format says" if data.format != "auto" else f"told by the keys {', '.join(form.keys)}"
    made.found = f"{form.name} ({told})"
    made.faults.sort(key=lambda fault: fault.row)
    return made


def report(faults: Sequence[Fault]) -> str:
    """The faults by kind, with the numbers of their rows and the remedy."""
    kinds: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        kinds[fault.kind].append(fault)
    lines = []
    for kind, members in kinds.items():
        numbers = ", ".join(str(f.row) for f in members[:10]) + (", ..." if len(members) > 10 else "")
        lines.append(f"{kind}: {len(members)} rows (numbers {numbers}; first {members[0].place}: {members[0].detail})")
        lines.append(f"    remedy: {REMEDIES[kind]}")
    return "\n".join(lines)


def settle(dataset: Dataset, data: Data, listing: Path | None, warn: Callable[[str], None]) -> Dataset:
    """Apply `on_bad_row`: an error, or the rows are left out, listed in a file and reported."""
    if not dataset.faults:
        return dataset
    text = f"{dataset.source}: {len(dataset.faults)} bad rows\n{report(dataset.faults)}"
    if data.on_bad_row == "error":
        raise DataError(f"{text}\nOr leave them out with data.on_bad_row=skip; nothing was trained.")
    if not dataset.documents:
        raise DataError(f"{text}\nNo row is left to train on.")
    if listing is not None:
        write_atomically(listing, "".join(json.dumps(vars(f)) + "\n" for f in dataset.faults))
        text += f"\nskipped; listed in {listing}"
    warn(text)
    return dataset


def split(dataset: Dataset, validation: float | int, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation): a share below 1 or a number of rows, drawn by the seed."""
    count = round(validation * len(dataset)) if isinstance(validation, float) else validation
    if not 0 < count < len(dataset):
        raise DataError(
            f"data.validation={validation} takes {count} of {len(dataset)} rows: give a share below 1 or a number that "
            "leaves rows on both sides"
        )
    drawn = np.random.default_rng([seed, 1 << 32]).permutation(len(dataset))
    return dataset.subset(sorted(drawn[count:].tolist())), dataset.subset(sorted(drawn[:count].tolist()))


Say = Callable[[str], None]


def open_rows(
    data: Data, renderer: Renderer, folder: Path | None, say: Say, warn: Say
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out rows, with everything that is wrong with them said; skipped ones are listed in `folder`."""
    training = load(data, data.train, renderer)
    say(f"{training.source}: {training.rows:,} rows, {training.found}")
    training = settle(training, data, folder and folder / "skipped_rows.jsonl", warn)
    validation = None
    if isinstance(data.validation, str):
        validation = load(data, data.validation, renderer)
        say(f"{validation.source}: {validation.rows:,} held-out rows, {validation.found}")
        validation = settle(validation, data, folder and folder / "skipped_validation_rows.jsonl", warn)
    elif data.validation is not None:
        training, validation = split(training, data.validation, data.seed)
    if data.limit is not None:
        training = training.subset(range(min(data.limit, len(training))))
    if not len(training):
        raise DataError("no row is left to train on")
    return training, validation
