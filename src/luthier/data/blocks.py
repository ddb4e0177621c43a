"""A stream of rows, cut into blocks: each is read, tokenised, shuffled and planned ahead of its first step.

A block is a function of where its readers stand, the seed and its number, so the position of a run is the number of
the block, the step inside it, and where the readers stood when it began: a few numbers in a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..files import write_atomically
from . import Data, Source, mixture, sources
from .dataset import Dataset, Say, form_of, held_out_file, named, report, settle
from .masks import Renderer
from .shards import Conversations, Documents, Shard
from .sources import Row
from .stream import Plan, Step, laid_out
from .tokenise import Fault, Task, stretches
from .workers import Workers, helpers_of_a_stream

BLOCK = 1 << 32  # documents are numbered from `block * BLOCK` on
Layout = Mapping[str, Any]  # examples, tokens, micro_tokens, pack


class Closed(Exception):
    """The stream was closed while a block was being made."""


class Place(NamedTuple):
    """Where a reader stands: the pass, the file in the order of that pass, and the next row of that file."""

    epoch: int = 0
    file: int = 0
    row: int = 0


class Read(NamedTuple):
    """A row, with the source that it belongs to and the pass in which it was read."""

    row: Row
    source: int
    epoch: int


class Reader:
    """The rows of some sources: file after file in another order in each pass, without those that are held out."""

    def __init__(self, entries: Sequence[tuple[int, Source]], data: Data, number: int):
        self.entries, self.seed, self.number = dict(entries), data.seed, number
        self.sample_by = data.sample_by
        self.files: list[tuple[int, str]] = []
        for index, entry in entries:
            for name in [entry.path] if isinstance(entry.path, str) else entry.path:
                found = sources.files_of(name, entry.split or "train")
                self.files += [(index, name if found is None else str(path)) for path in found or [Path(name)]]
        self.name = ", ".join(named(entry) for _, entry in entries)
        self.leading: dict[int, int] = {}  # file -> how many of its first rows are held out
        self.held: Callable[[Row], bool] | None = None
        self.place = Place()
        self.gave = False  # whether the pass at hand gave a row
        self._open: tuple[Place, Iterator[Row]] | None = None

    def listing(self) -> list[list]:
        """The files with their sizes: what can be told of their content without reading them."""
        told = []
        for _, name in self.files:
            path = Path(name)
            told.append([path.name, path.stat().st_size if path.is_file() else None])
        return told

    def go(self, place: Place) -> None:
        if self.place != place:
            self.close()
            self.place, self.gave = place, place != Place(place.epoch)

    def order(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, epoch, self.number + 1, 1 << 31]).permutation(len(self.files)).tolist()

    def forms(self, kind: str) -> dict[int, tuple[str, str]]:
        """The format of each source, and how the first rows of its first file told it."""
        made: dict[int, tuple[str, str]] = {}
        for index, name in self.files:
            if index not in made:
                rows = self._rows(index, name, 0)
                made[index] = form_of(self.entries[index], rows, kind)[:2]
                rows.close()  # type: ignore[attr-defined]
        return made

    def in_order(self) -> Iterator[tuple[int, Read]]:
        """Every row once, file after file as they are named, with the number of its file."""
        for file, (index, name) in enumerate(self.files):
            for row in self._rows(index, name, 0):
                yield file, Read(row, index, 0)

    def take(self, count: int, one_pass: bool) -> list[Read]:
        """The next `count` rows, or with `one_pass` those up to the end of the pass."""
        taken: list[Read] = []
        while len(taken) < count:
            read = self._next()
            if read is not None:
                taken.append(read)
            elif one_pass and taken:
                break
        return taken

    def _next(self) -> Read | None:
        """The next row; None at the end of a pass."""
        while True:
            epoch, position, _ = self.place
            file = self.order(epoch)[position]
            index, name = self.files[file]
            if self._open is None or self._open[0] != self.place:
                self.close()
                self.place = self.place._replace(row=max(self.place.row, self.leading.get(file, 0)))
                self._open = (self.place, self._rows(index, name, self.place.row))
            for row in self._open[1]:
                self.place = self.place._replace(row=row.number + 1)
                self._open = (self.place, self._open[1])
                if self.held is None or not self.held(row):
                    self.gave = True
                    return Read(row, index, epoch)
            if position + 1 < len(self.files):
                self.place = Place(epoch, position + 1)
                continue
            if not self.gave:
                raise DataError(f"{self.name}: no row is left to train on: all are held out")
            self.place, self.gave = Place(epoch + 1), False
            return None

    def _rows(self, index: int, name: str, start: int) -> Iterator[Row]:
        entry = self.entries[index]
        return sources.read(name, entry.subset, entry.split or "train", start, self.sample_by)

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()  # type: ignore[attr-defined]
            self._open = None


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


@dataclass
class Standing:
    """A block, the number of its first step in the run, and what came before that step."""

    block: Block
    first: int
    tokens: int
    documents: int


class Steps(Sequence[Step]):
    """The steps of a run on a stream, in their order: the one at hand and the next can be asked for."""

    def __init__(self, stream: Stream, layout: Layout, total: int):
        self.stream, self.layout, self.total = stream, layout, total
        # Its own tokenizer, as it is used beside the training.
        helpers = helpers_of_a_stream(stream.data.num_proc, stream.size())
        self.workers = Workers(helpers, deepcopy(stream.renderer))
        self.closed = threading.Event()
        self.thread: threading.Thread | None = None
        self.ahead: tuple[int, list[Place], Future[Block]] | None = None
        self.standing: list[Standing] = []
        self.barren: list[Place] | None = None  # where the readers stood when blocks began to be empty
        self.passes = [0] * len(stream.readers)

    def __len__(self) -> int:
        return self.total

    @property
    def caption(self) -> str:
        return f"{self.total:,} steps of a stream, in blocks of {self.stream.data.shuffle_buffer:,} rows"

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.total:
            raise IndexError(index)
        at = self._at(index)
        return at.block.steps(index - at.first)

    def known(self, step: int) -> bool:
        """Whether the documents of a step can be made before the one before it is taken."""
        return True

    def _at(self, step: int) -> Standing:
        """The block of a step: one of those at hand, or the next."""
        if not self.standing:
            self._enter(0, [Place()] * len(self.stream.readers), 0, 0, 0)
        while True:
            for at in self.standing:
                if at.first <= step < at.first + len(at.block.plan):
                    return at
            assert step >= self.standing[-1].first, "steps are taken in order"
            self._enter(*self._after())

    def _after(self) -> tuple[int, list[Place], int, int, int]:
        """What `_enter` takes for the block after the one at hand."""
        last = self.standing[-1]
        block = last.block
        return (
            block.number + 1, block.ended, last.first + len(block.plan), last.tokens + block.plan.tokens(),
            last.documents + len(block.documents),
        )  # fmt: skip

    def _enter(self, number: int, places: list[Place], first: int, tokens: int, documents: int) -> None:
        """Make a block the one at hand, and begin with the next."""
        if self.ahead is None or self.ahead[:2] != (number, places):
            self._prepare(number, places)
        assert self.ahead is not None
        block = self.ahead[2].result()
        self.standing = [*self.standing[-1:], Standing(block, first, tokens, documents)]
        self.stream.blocks = [at.block for at in self.standing]
        self._tell(block)
        self._prepare(number + 1, block.ended)

    def _prepare(self, number: int, places: list[Place]) -> None:
        self._join()
        done: Future[Block] = Future()

        def work() -> None:
            try:
                done.set_result(self.stream.made(number, places, self.layout, self.workers, self.closed))
            except BaseException as error:
                done.set_exception(error)

        self.ahead = (number, places, done)
        self.thread = threading.Thread(target=work, daemon=True, name=f"block {number}")
        self.thread.start()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    # ------------------------------------------------------------------ what is said of a block
    def _tell(self, block: Block) -> None:
        stream = self.stream
        if not len(block.plan):
            self.barren = self.barren or block.began
            if all(now.epoch > then.epoch + 1 for now, then in zip(block.ended, self.barren)):
                raise DataError("a whole pass of the stream has no row that can be learnt; see those that were skipped")
        else:
            self.barren = None
        for i, (reader, ended) in enumerate(zip(stream.readers, block.ended)):
            if ended.epoch > self.passes[i] and ended.epoch > block.began[i].epoch:
                stream.say(f"{reader.name}: pass {ended.epoch + 1} begins in block {block.number + 1}")
            self.passes[i] = ended.epoch
        new = [fault for epoch, fault in block.faults if epoch == 0]  # later passes meet them again
        path = stream.folder and stream.folder / "skipped_rows.jsonl"
        if path is not None:
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if json.loads(line).get("block", block.number) < block.number]
            added = [json.dumps({"block": block.number, **asdict(fault)}) for fault in new]
            if kept + added != lines:
                write_atomically(path, "".join(line + "\n" for line in kept + added))
        if cut := block.documents.cut():
            stream.warn(
                f"block {block.number + 1} of the stream: {cut:,} of {len(block.documents):,} texts are longer than "
                f"data.max_length={stream.data.max_length} and were cut to it"
            )
        if line := self._one_sided(block):
            stream.warn(line)
        if new:
            where = f"; listed in {path}" if path else ""
            stream.warn(f"block {block.number + 1} of the stream: {len(new)} bad rows skipped{where}\n{report(new)}")

    def _one_sided(self, block: Block) -> str | None:
        """What is to be said of answers that are all liked, or none of them."""
        if self.stream.renderer.kind != "unpaired" or not len(block.documents):
            return None
        liked = block.documents.labels()[:, 0].astype(bool)
        if liked.any() and not liked.all():
            return None
        side = "true" if liked[0] else "false"
        return (
            f"block {block.number + 1} of the stream: all {len(liked):,} rows are labelled {side}: "
            "nothing tells KTO its other side there; mix the files, or raise data.shuffle_buffer"
        )

    # ------------------------------------------------------------------ what the loop asks of any steps
    def totals(self, steps: int | None = None) -> dict:
        """Documents and tokens of the first so many steps, once they were taken."""
        taken = self.total if steps is None else steps
        at = self._at(taken - 1)
        plan, steps = at.block.plan, taken - at.first
        return {"rows": at.documents + plan.documents_until(steps), "tokens": at.tokens + plan.tokens(steps)}

    def position(self, step: int) -> dict:
        """Where `step` is: its block and where the readers stood, with what tells whether the rows are the same."""
        of_block = None
        try:
            at = self._at(min(step, self.total - 1))
            number, places, first, tokens, documents = (
                at.block.number, at.block.began, at.first, at.tokens, at.documents,
            )  # fmt: skip
            of_block = at.block.told()
        except DataError:  # the next block cannot be made: the run is to stand before it
            number, places, first, tokens, documents = self._after()
        return {
            "files": self.stream.fingerprint(), "block": number, "first": first, "tokens": tokens,
            "documents": documents, "readers": [list(place) for place in places], "of_block": of_block,
        }  # fmt: skip

    def resume(self, position: dict, step: int) -> str | None:
        """Go to where a checkpoint stands; what is no longer as it was then, if something is."""
        if position.get("files") != self.stream.fingerprint():
            return "files of the stream"
        self.standing = []
        places = [Place(*place) for place in position["readers"]]
        self._enter(position["block"], places, position["first"], position["tokens"], position["documents"])
        then, here = position["of_block"], self.standing[-1].block.told()
        if then is None or then == here:
            return None
        return "rows" if then["rows"] != here["rows"] else "order of the rows"

    def close(self) -> None:
        """Stop what is being made, and the helpers."""
        self.closed.set()
        self.workers.kill()
        self._join()
        self.workers.close()
        for reader in self.stream.readers:
            reader.close()


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
