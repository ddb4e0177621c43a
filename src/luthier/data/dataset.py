"""A data set as tokens: rows read, recognised, rendered, checked and split; what is wrong is counted, never dropped."""

from __future__ import annotations

import json
import os
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..document import Document
from ..errors import DataError
from ..files import write_atomically
from ..labels import NOTHING, ONE
from . import Data, Source, cache, holdout, sources, stream
from .conversations import Conversation
from .formats import first_recognised
from .masks import Renderer
from .shards import Conversations, Documents
from .tokenise import Fault, Task, stretches
from .workers import Workers, helpers

if TYPE_CHECKING:
    from .blocks import Stream

REMEDIES = {
    "format": "mend the rows, or name their columns with data.columns",
    "equal_answers": "remove the rows, or give them two answers that differ",
    "label": "mend the label, or name the column that holds it with data.columns",
    "empty_text": "remove the rows, or give them a text",
    "word": "remove the word, or write it so that the tokenizer has a token for it",
    "role_order": "mend the order of the turns",
    "empty_answer": "remove the rows, or give them an answer",
    "no_trained_token": "remove the rows, or give them an assistant turn",
    "truncated": "raise data.max_length, or shorten the rows",
    "template": "use another model.chat_template, or mend the rows",
    "special_token": "remove the token from the text: it would be read as the end of a turn",
}
Say = Callable[[str], None]


def _silent(text: str) -> None:
    pass


@dataclass
class Dataset:
    """Documents in the order of their files, the conversations that they came from, and the bad rows.

    Both are sequences whose members are made when they are asked for; what they are made of may stand on the disk.
    """

    documents: Sequence[Document]
    conversations: Sequence[Conversation]
    faults: list[Fault]
    found: str  # the format, and how it was told
    source: str
    renderer: Renderer
    parts: list[tuple[str, int]] = field(default_factory=list)  # sources and how many documents each has
    weights: list[float] | None = None  # of the parts, where they are a mixture
    _lengths: array | None = field(default=None, repr=False)

    @property
    def _store(self) -> Documents:
        if not isinstance(self.documents, Documents):
            self.documents = Documents.of(self.documents)
        return self.documents

    @property
    def lengths(self) -> array:
        """How many tokens of each document are run, which is what packing goes by."""
        if self._lengths is None:
            self._lengths = self._store.lengths()
        return self._lengths

    @property
    def tokens(self) -> int:
        return self._store.tokens()

    @property
    def trained_tokens(self) -> int:
        return self._store.trained_tokens()

    @property
    def rows(self) -> int:
        """Rows that were read, good and bad; a row can be several documents."""
        shards = self._store.shards
        return sum(max(len(s.arrays["text_ends"]) - 1, 0) for s in shards) + len(self.faults)

    def row_numbers(self) -> np.ndarray:
        """[D] the row of each document, counted over all sources."""
        return self._store.rows()

    def labels(self) -> np.ndarray:
        """[D, K] what is said of each row."""
        return self._store.labels()

    def members(self) -> np.ndarray:
        """[D] how many texts each document is of."""
        return self._store.members()

    def __len__(self) -> int:
        return len(self.documents)

    def cut_line(self) -> str | None:
        """What is said of rows that were too long."""
        count = self._store.cut()
        if not count:
            return None
        return (
            f"{self.source}: {count:,} of {len(self):,} texts are longer than data.max_length="
            f"{self.renderer.max_length} and were cut to it"
        )

    def fingerprint(self) -> str:
        """Changes with any token or weight of any row."""
        return self._store.fingerprint()

    def subset(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """The documents of these numbers, which ascend."""
        documents = self._store.select(indices)
        borders = np.searchsorted(np.asarray(indices, np.int64), np.cumsum([0, *(size for _, size in self.parts)]))
        parts = [(name, int(size)) for (name, _), size in zip(self.parts, np.diff(borders))]
        conversations = Conversations(documents.shards, documents.chosen)
        return replace(
            self, documents=documents, conversations=conversations, faults=[], parts=parts, _lengths=None
        )  # fmt: skip

    def plan(
        self, *, examples: int | None, tokens: int | None, micro_tokens: int, pack: bool, seed: int,
        epochs: int | None, max_steps: int | None,
    ) -> stream.Plan:  # fmt: skip
        """All steps of a run on these documents."""
        return stream.plan(
            self.lengths, examples=examples, tokens=tokens, micro_tokens=micro_tokens, pack=pack, seed=seed,
            epochs=epochs, max_steps=max_steps, sizes=[size for _, size in self.parts], weights=self.weights,
            fingerprint=self.fingerprint(),
        )  # fmt: skip

    def passes(self, steps: stream.Plan) -> list[str]:
        """Of a mixture: how often each source is gone through, a line each."""
        if self.weights is None:
            return []
        drawn = np.bincount(np.frombuffer(steps.documents, np.int32), minlength=len(self))
        starts = np.cumsum([0, *(size for _, size in self.parts)])
        lines = []
        for (name, size), start, weight in zip(self.parts, starts, self.weights):
            count = int(drawn[start : start + size].sum())
            share = weight / sum(self.weights)
            lines.append(f"{name}: {share:.1%} of the rows; {count:,} of {size:,}, which is {count / size:.2f} passes")
        return lines


def load(
    data: Data, source: str | list[str] | Source, renderer: Renderer, say: Say = _silent, warn: Say = _silent
) -> Dataset:
    """Read and render all rows of a source; bad ones are collected, whatever `on_bad_row` says."""
    entry = data.complete(source)
    files = cache.files_of(entry)

    def make(folder: Path | None) -> cache.Kept:
        return _made(data, entry, renderer, cache.size_of(files), folder)

    if files is not None and _kept_on_disk(data, files, warn):
        key = cache.key_of(data, entry, files, renderer)
        shards, faults, found = cache.kept(cache.root_of(data), key, make, say, warn)
    else:
        shards, faults, found = make(None)
    documents = Documents(shards)
    name = named(entry)
    return Dataset(documents, Conversations(shards), faults, found, name, renderer, [(name, len(documents))])


def named(entry: Source) -> str:
    return entry.path if isinstance(entry.path, str) else ", ".join(entry.path)


def _kept_on_disk(data: Data, files: Sequence[Path], warn: Say) -> bool:
    if not cache.wanted(data, files):
        return False
    if data.cache == "auto":
        root = cache.root_of(data)
        try:
            root.mkdir(parents=True, exist_ok=True)
            fits = os.access(root, os.W_OK)
        except OSError:
            fits = False
        if not fits:
            warn(f"tokens are not kept for the next time: {root} cannot be written; give data.cache_dir")
        return fits
    return True


def _made(data: Data, entry: Source, renderer: Renderer, size: int | None, folder: Path | None) -> cache.Kept:
    """All shards of a source, in memory or as files in `folder`."""
    rows = sources.read(entry.path, entry.subset, entry.split or "train", sample_by=data.sample_by)
    form, found, taken = form_of(entry, rows, renderer.kind)

    def tasks() -> Iterator[Task]:
        for number, stretch in enumerate(stretches(chain(taken, rows))):
            path = None if folder is None else folder / f"{number:08}.safetensors"
            yield Task(stretch, form, entry.columns or {}, path)

    shards, faults = [], []
    with Workers(helpers(data.num_proc, size), renderer) as workers:
        for made in workers.map(tasks()):
            shards.append(made.shard)
            faults += made.faults
    return shards, faults, found


def form_of(entry: Source, rows: Iterator[sources.Row], kind: str) -> tuple[str, str, list[sources.Row]]:
    """The format of a source for rows of this kind, how it was told, and the rows taken to tell it."""
    if entry.format not in (None, "auto"):
        return entry.format, f"{entry.format} (as data.format says)", []
    form, taken = first_recognised(rows, entry.columns or {}, kind)
    return form.name, f"{form.name} (told by the keys {', '.join(form.keys)})", taken


def joined(members: Sequence[Dataset], weights: list[float] | None) -> Dataset:
    """Several sources as one data set; rows are numbered over all of them."""
    if len(members) == 1:
        return replace(members[0], weights=weights)
    shards, faults, before = [], [], 0
    for member in members:
        assert isinstance(member.documents, Documents)
        assert member.documents.chosen is None, "sources are joined whole"
        shards += [replace(shard, before=before) for shard in member.documents.shards]
        faults += [replace(fault, row=fault.row + before) for fault in member.faults]
        before += member.rows
    return Dataset(
        Documents(shards), Conversations(shards), faults, "; ".join(dict.fromkeys(m.found for m in members)),
        ", ".join(m.source for m in members), members[0].renderer, [part for m in members for part in m.parts],
        weights,
    )  # fmt: skip


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
    held_out = np.isin(dataset.row_numbers(), list(holdout.drawn(dataset.rows, validation, seed)))
    if held_out.all() or not held_out.any():
        raise DataError(f"data.validation={validation}: all rows of one side are bad; give another data.seed")
    return dataset.subset(np.flatnonzero(~held_out)), dataset.subset(np.flatnonzero(held_out))


def open_rows(
    data: Data, renderer: Renderer, folder: Path | None, say: Say, warn: Say
) -> tuple[Dataset | Stream, Dataset | None]:
    """Training and held-out rows, with everything that is wrong with them said; skipped ones are listed in `folder`."""
    holdout.refuse_families(data)
    if data.streaming:
        from .blocks import open_stream

        return open_stream(data, renderer, folder, say, warn)
    entries, members = data.sources(), []
    for entry in entries:
        members.append(load(data, entry, renderer, say, warn))
        say(f"{members[-1].source}: {members[-1].rows:,} rows, {members[-1].found}")
    weights = [entry.weight for entry in entries if entry.weight is not None]
    training = joined(members, weights or None)
    training = settle(training, data, folder and folder / "skipped_rows.jsonl", warn)
    validation = None
    if isinstance(data.validation, str):
        validation = held_out_file(data, renderer, folder, say, warn)
    elif data.validation is not None:
        training, validation = split(training, data.validation, data.seed)
    training = _limited(training, [entry.limit for entry in entries], data.limit)
    if not len(training):
        raise DataError("no row is left to train on")
    for rows in filter(None, (training, validation)):
        if line := rows.cut_line():
            warn(line)
    check_labels(training)
    for name, size in training.parts:
        if training.weights is not None and not size:
            raise DataError(f"{name}: no row is left of it to train on, and it has a share: leave it out of data.train")
    return training, validation


def check_labels(training: Dataset) -> None:
    """One label on all rows teaches nothing but to say it."""
    renderer, seen = training.renderer, set()
    if renderer.kind not in ("labelled", "tagged"):
        return
    for document in training.documents:
        seen.update([document.labels] if document.token_labels is None else document.token_labels.tolist())
        seen.discard(NOTHING)
        if len(seen) > 1:
            return
    (only,) = seen
    if renderer.problem == ONE:
        only = renderer.labels[int(only[0] if isinstance(only, tuple) else only)]
    raise DataError(
        f"{training.source}: all {len(training):,} rows have the label {only!r}, so there is nothing to tell apart: "
        "give rows of at least two labels"
    )


def held_out_file(data: Data, renderer: Renderer, folder: Path | None, say: Say, warn: Say) -> Dataset:
    assert isinstance(data.validation, str)
    validation = load(data, data.validation, renderer, say, warn)
    say(f"{validation.source}: {validation.rows:,} held-out rows, {validation.found}")
    return settle(validation, data, folder and folder / "skipped_validation_rows.jsonl", warn)


def _limited(dataset: Dataset, limits: Sequence[int | None], limit: int | None) -> Dataset:
    """The first so many documents of each part, then of the whole."""
    if any(own is not None for own in limits):
        starts = np.cumsum([0, *(size for _, size in dataset.parts)])
        sizes = [size if own is None else min(own, size) for (_, size), own in zip(dataset.parts, limits)]
        dataset = dataset.subset(np.concatenate([start + np.arange(n) for start, n in zip(starts, sizes)]))
    if limit is not None and limit < len(dataset):
        dataset = dataset.subset(np.arange(limit))
    return dataset
