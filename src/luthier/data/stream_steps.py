"""The steps of a run on a stream: those of the block at hand, while the next is made beside them."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..files import write_atomically
from .cursor import Place
from .dataset import report
from .stream import Step
from .workers import Workers, helpers_of_a_stream

if TYPE_CHECKING:
    from .blocks import Block, Layout, Stream


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
