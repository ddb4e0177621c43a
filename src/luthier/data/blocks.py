"""A stream of rows, cut into blocks: each is read, tokenised, shuffled and planned ahead of its first step.

A block is a function of where its readers stand, the seed and its number, so the position of a run is the number of
the block, the step inside it, and where the readers stood when it began: a few numbers in a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from . import Data, mixture
from .cursor import Place, Read, Reader
from .dataset import Dataset, Say, held_out_file, named, report, settle
from .masks import Renderer
from .shards import Conversations, Documents, Shard
from .sources import Row
from .stream import Plan, Step, laid_out
from .stream_steps import Steps
from .tokenise import Fault, Task, stretches
from .workers import Workers

BLOCK = 1 << 32  # documents are numbered from `block * BLOCK` on
Layout = Mapping[str, Any]  # examples, tokens, micro_tokens, pack


class Closed(Exception):
    """The stream was closed while a block was being made."""


@dataclass(frozen=True)
class Block:
    """What is in memory at a time: documents and their steps."""

    number: int
    documents: Documents
    lengths: Sequence[int]
    plan: Plan
    faults: list[tuple[int, Fault]]  # with the pass in which the row was read
    began: list[Place]  # where the readers stood
    ended: list[Place]

    def told(self) -> dict:
        """What tells whether the block is what it was."""
        return {"rows": self.plan.fingerprint, "plan": self.plan.digest()}

    def steps(self, index: int) -> Step:
        return [[self.number * BLOCK + d for d in row] for row in self.plan[index]]


class Stream:
    """Rows to train on that are never all in memory. `documents` and `lengths` know those of the steps at hand."""

    weights: list[float] | None

    def __init__(self, data: Data, renderer: Renderer, folder: Path | None, say: Say, warn: Say):
        self.data, self.renderer, self.folder, self.say, self.warn = data, renderer, folder, say, warn
        entries = list(enumerate(data.sources()))
        weights = [entry.weight for _, entry in entries if entry.weight is not None]
        self.weights = weights or None
        # Without weights all files are one pool; with them each source is read by itself.
        pools = [[member] for member in entries] if weights else [entries]
        self.readers = [Reader(pool, data, number) for number, pool in enumerate(pools)]
        self.shares = mixture.shares_of(weights) if weights else [1.0]
        self.forms: dict[int, str] = {}
        for reader in self.readers:
            for index, (form, found) in reader.forms(renderer.kind).items():
                self.forms[index] = form
                say(f"{named(reader.entries[index])}: a stream of {found}")
        if weights:
            for reader, share in zip(self.readers, self.shares):
                say(f"{reader.name}: {share:.1%} of the rows, as many passes as that takes")
        self.documents = _Held(self, lambda block: block.documents)
        self.lengths = _Held(self, lambda block: block.lengths)
        self.blocks: list[Block] = []  # the one before and the one at hand

    def fingerprint(self) -> str:
        """Of the files: their names and sizes."""
        told = json.dumps([reader.listing() for reader in self.readers])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def size(self) -> int | None:
        """Bytes of the files, where all are here."""
        sizes = [size for reader in self.readers for _, size in reader.listing()]
        return None if None in sizes else sum(sizes)

    def block(self, number: int) -> Block:
        return next(block for block in self.blocks if block.number == number)

    def made(
        self, number: int, began: Sequence[Place], layout: Layout, workers: Workers, closed: threading.Event
    ) -> Block:
        """Block `number`, whose readers begin at these places."""
        if closed.is_set():
            raise Closed
        groups: list[list[int]] = []
        shards: list[Shard] = []
        faults: list[tuple[int, Fault]] = []
        before, ended = 0, []
        for reader, place, share in zip(self.readers, began, self.shares):
            reader.go(place)
            size = self.data.shuffle_buffer
            count = mixture.taken_before(share, (number + 1) * size) - mixture.taken_before(share, number * size)
            rows = reader.take(count, one_pass=self.weights is None)
            ended.append(reader.place)
            start = before
            for shard, bad in self._tokenised(rows, workers, closed):
                shards.append(shard)
                faults += bad
                before += len(shard)
            groups.append(list(range(start, before)))
        documents = Documents(shards)
        lengths = documents.lengths()
        seed = self.data.seed
        shuffled = [
            np.random.default_rng([seed, number, i + 1, 1 << 30]).permutation(np.asarray(group, np.int64))
            for i, group in enumerate(groups)
        ]
        steps = laid_out([mixture.merged(shuffled).tolist()], lengths, **layout)
        plan = Plan(steps, lengths, documents.fingerprint())
        return Block(number, documents, lengths, plan, faults, list(began), ended)

    def _tokenised(
        self, rows: Sequence[Read], workers: Workers, closed: threading.Event
    ) -> Iterator[tuple[Shard, list[tuple[int, Fault]]]]:
        """Shards of the rows, in their order."""
        stretched = [
            (epoch, index, part)
            for (index, epoch), group in groupby(rows, key=lambda read: (read.source, read.epoch))
            for part in stretches(read.row for read in group)
        ]

        def tasks() -> Iterator[Task]:
            for _, index, part in stretched:
                if closed.is_set():
                    raise Closed
                entry = next(r.entries[index] for r in self.readers if index in r.entries)
                yield Task(part, self.forms[index], entry.columns or {})

        for (epoch, _, _), made in zip(stretched, workers.map(tasks())):
            faults = [(epoch, fault) for fault in made.faults]
            if faults and self.data.on_bad_row == "error":
                raise DataError(
                    f"bad rows in the stream\n{report(made.faults)}\nOr leave such rows out with "
                    "data.on_bad_row=skip; the same run then goes on where it stands."
                )
            yield made.shard, faults

    def held_out(self, wanted: int | float) -> Dataset:
        """The rows that are not learnt: the first `wanted`, or the share that a hash of their content picks.

        The hash takes equal rows to the same side. For a share the whole stream is read once.
        """
        picked: list[Read] = []
        if isinstance(wanted, float):
            for reader in self.readers:
                reader.held = _Picked(self.data.seed, wanted)
                picked += [read for _, read in reader.in_order() if reader.held(read.row)]
        else:
            owners = next(mixture.turns(self.shares, window=wanted + len(self.shares)))[:wanted]
            for reader, count in zip(self.readers, np.bincount(owners, minlength=len(self.readers)).tolist()):
                rows = reader.in_order()
                for file, read in rows:
                    if not count:
                        rows.close()  # type: ignore[attr-defined]
                        break
                    picked.append(read)
                    reader.leading[file] = read.row.number + 1
                    count -= 1
                else:
                    raise DataError(f"data.validation={wanted} takes all rows of {reader.name}: give a smaller number")
        closed = threading.Event()
        with Workers(0, self.renderer) as workers:
            done = list(self._tokenised_leniently(picked, workers, closed))
        shards = [shard for shard, _ in done]
        documents = Documents(shards)
        name = f"held out of the stream by data.validation={wanted}"
        if not len(documents) and not any(faults for _, faults in done):
            raise DataError(f"data.validation={wanted} picks no row of the stream: give a larger share")
        return Dataset(
            documents, Conversations(shards), [fault for _, faults in done for _, fault in faults], "", name,
            self.renderer, [(name, len(documents))],
        )  # fmt: skip

    def _tokenised_leniently(self, rows: Sequence[Read], workers: Workers, closed: threading.Event):
        """Bad rows among the held-out ones are told all at once."""
        data, self.data = self.data, self.data.model_copy(update={"on_bad_row": "skip"})
        try:
            yield from self._tokenised(rows, workers, closed)
        finally:
            self.data = data

    def plan(
        self, *, examples: int | None, tokens: int | None, micro_tokens: int, pack: bool, seed: int,
        epochs: int | None, max_steps: int | None,
    ) -> Steps:  # fmt: skip
        """The steps of a run, made as they come."""
        assert max_steps is not None, "checked with the configuration"
        return Steps(
            self, {"examples": examples, "tokens": tokens, "micro_tokens": micro_tokens, "pack": pack}, max_steps
        )


class _Picked:
    """Whether a row is held out: a hash of what it says, as a number below 1, is less than the share."""

    def __init__(self, seed: int, share: float):
        self.seed, self.limit = seed, int(share * (1 << 64))

    def __call__(self, row: Row) -> bool:
        text = json.dumps([self.seed, row.values], sort_keys=True, default=str)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < self.limit


class _Held(Sequence):
    """What the blocks at hand have, by the number of the document; slices are of the newest block."""

    def __init__(self, stream: Stream, of: Callable[[Block], Sequence]):
        self.stream, self.of = stream, of

    def __len__(self) -> int:
        return sum(len(self.of(block)) for block in self.stream.blocks[-1:])

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return list(self.of(self.stream.blocks[-1])[index])
        number, place = divmod(index, BLOCK)
        return self.of(self.stream.block(number))[place]


def open_stream(
    data: Data, renderer: Renderer, folder: Path | None, say: Say, warn: Say
) -> tuple[Stream, Dataset | None]:
    """The stream to train on, and the held-out rows: of a file, or taken out of it."""
    made = Stream(data, renderer, folder, say, warn)
    if data.validation is None:
        return made, None
    if isinstance(data.validation, str):
        return made, held_out_file(data, renderer, folder, say, warn)
    validation = made.held_out(data.validation)
    say(f"{len(validation):,} documents {validation.source}")
    return made, settle(validation, data, folder and folder / "skipped_validation_rows.jsonl", warn)
