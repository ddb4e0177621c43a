"""The steps of a run in numbers: rows, tokens and the schedule; counted where the data is small, else assumed."""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..assemble import tokenizer_and_renderer
from ..batch import begin_alike
from ..completions import prompt_of
from ..config import Config
from ..data import Data, kinds
from ..data.blocks import Place, Stream
from ..data.dataset import Dataset, open_rows
from ..data.stream import Plan as Steps
from ..data.workers import Workers
from ..document import Document
from ..errors import LuthierError
from ..labels import SEVERAL
from ..models.names import TRAIN
from ..optim import schedule
from ..rollouts import Rollouts, asked_at_once, mini_batch

WITH_LABELS = ("labelled", "tagged")  # kinds of rows of which no token is predicted
SMALL = 4 << 20  # bytes of data files that are read and tokenised, a few seconds' work
SAMPLED = 256  # rows of a stream that are read, rows of a plan that are reckoned with, rounds of answers: no more


@dataclass(frozen=True)
class Row:
    """The shape of one pass through the network."""

    lengths: tuple[int, ...]  # tokens of each document
    learnt: int  # tokens that something is learnt at
    units: tuple[int, ...] = ()  # cumulative documents of each row of the data; () where each has one
    labels: int = 0  # numbers that are said of each row of the data
    alike: tuple[int, ...] = ()  # with how many tokens each document begins as the one before it does; () is 0
    tags: bool = False  # whether something is said of its tokens
    run: int | None = None  # tokens that are run, where that is fewer, as neighbours' starts are run once

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def size(self) -> tuple[int, int, int]:
        """By which the largest is told."""
        return self.tokens if self.run is None else self.run, self.tokens, self.learnt


class Passed(NamedTuple):
    """What a row comes to in the network."""

    run: int  # tokens
    squares: int  # of the lengths of documents, less those of what the one before had run already


Passes = Callable[[Row], Passed]


def apart(row: Row) -> Passed:
    """Where each document is run by itself."""
    return Passed(row.tokens, sum(n * n for n in row.lengths))


@dataclass(frozen=True)
class Plan:
    """What a run will pass through the network, as far as it is known."""

    rows: tuple[Row, ...]  # the largest, which decides the peak of memory, and others of a step
    rows_per_step: float
    tokens_per_step: float
    run_per_step: float  # tokens that are run for them
    squares_per_token: float  # sum of squared lengths over tokens that are run: what attention costs
    steps: int | None
    source: str  # how the figures above were come by
    bytes: int = 0  # of the documents in memory

    @property
    def largest(self) -> Row:
        return max(self.rows, key=lambda row: row.size)

    @property
    def saves(self) -> bool:
        """Whether less is run than there is."""
        return self.run_per_step < self.tokens_per_step - 0.5

    def to_json(self) -> dict:
        made = {key: value for key, value in vars(self).items() if key != "rows"}
        row = {"tokens": self.largest.tokens, "learnt": self.largest.learnt, "documents": len(self.largest.lengths)}
        return made | {"largest_row": row}


def plan_line(dataset: Any, steps: Any, micro_tokens: int) -> str:
    """The rows and steps of a run in a sentence, and the passes of each source of a mixture."""
    if caption := getattr(steps, "caption", None):  # of a stream, or of answers that are yet to be given
        return caption
    assert isinstance(dataset, Dataset)
    assert isinstance(steps, Steps)
    rows, count, tokens = len(steps.rows) - 1, len(steps), steps.tokens()
    learnt = f", {dataset.trained_tokens:,} of them learnt" if dataset.renderer.kind not in WITH_LABELS else ""
    lines = [
        f"{len(dataset):,} rows, {dataset.tokens:,} tokens{learnt}; "
        f"{count:,} steps of {len(steps.documents) / count:.1f} rows in {rows / count:.1f} packed rows "
        f"({tokens / (rows * micro_tokens):.1%} of {micro_tokens} slots each)"
    ]
    return "\n".join(lines + dataset.passes(steps))


def made_plan(config: Config, count: bool = True, passes: Passes = apart) -> Plan:
    """Counted from the data where its files are small, told by the first rows of a stream, else assumed from the
    settings. `passes` says what the network makes of a row."""
    size = _bytes(config.data)
    if config.model.tokenizer == TRAIN:
        return assumed(config, "assumed, as the tokenizer is yet to be trained", passes)
    if not count or size is None or (size > SMALL and not config.data.streaming):
        why = "no small local data was given" if size is None else f"the data has {size / 1e6:.0f} MB"
        return assumed(config, f"assumed, as {why}" if count else "assumed", passes)
    try:
        if config.data.streaming:
            return of_a_stream(config, passes)
        return answered(config, passes) if config.objective.rolls_out else counted(config, passes)
    except (LuthierError, ImportError) as error:  # a folder with a config.json only has no tokenizer
        return assumed(config, f"assumed, as the data cannot be counted: {str(error).splitlines()[0]}", passes)


def _opened(config: Config) -> Dataset:
    _, renderer = tokenizer_and_renderer(config)
    training, _ = open_rows(config.data, renderer, None, lambda text: None, lambda text: None)
    assert isinstance(training, Dataset)
    return training


def counted(config: Config, passes: Passes = apart) -> Plan:
    training, batch = _opened(config), config.batch
    steps = training.plan(
        examples=batch.examples, tokens=batch.tokens, micro_tokens=batch.micro_tokens, pack=batch.packing,
        seed=config.data.seed, epochs=config.epochs, max_steps=config.max_steps,
    )
    told = f"counted: {plan_line(training, steps, batch.micro_tokens)}"
    rows = [row for step in steps for row in step]
    made = _of_rows(config, rows, len(steps), training.documents, training.lengths, passes)
    return replace(made, steps=len(steps), source=told, bytes=8 * training.tokens)


def _of_rows(
    config: Config, rows: Sequence[list[int]], steps: int, documents: Any, lengths: Sequence[int], passes: Passes
) -> Plan:  # fmt: skip
    """A plan of rows of documents, in so many steps. Of many rows, some tell what share of their tokens is run."""

    def slots(row: list[int]) -> tuple[int, int]:
        taken = sum(lengths[d] for d in row) if config.batch.packing else max(lengths[d] for d in row) * len(row)
        return taken, sum(lengths[d] ** 2 for d in row)

    some = rows[:: -(-len(rows) // SAMPLED)]
    shapes = [shape([documents[d] for d in row]) for row in some]
    passed = [passes(row) for row in shapes]
    run, squares = (sum(each) for each in zip(*passed))
    total = sum(lengths[d] for row in rows for d in row)
    large = [shape([documents[d] for d in row]) for row in heapq.nlargest(8, rows, key=slots)]
    run_once = any(any(row.alike) for row in large)
    largest = max(large, key=lambda row: passes(row)) if config.batch.packing and run_once else large[0]
    first = [shape([documents[d] for d in row]) for row in rows[:2]]  # a heap is fragmented by different lengths
    kept = [replace(row, run=passes(row).run) for row in (*first, largest)]
    share = run / sum(row.tokens for row in shapes)
    return Plan(tuple(kept), len(rows) / steps, total / steps, share * total / steps, squares / run, None, "")


def shape(documents: Sequence[Document]) -> Row:
    """What documents are in a row, without their values."""
    learnt = sum(int((document.weights > 0).sum()) for document in documents)
    members = [member.tokens[: member.inputs] for document in documents for member in document.members]
    units = (0, *accumulate(len(document.starts) for document in documents))
    first = documents[0]
    shared = units if len(members) > len(documents) else ()
    tagged = first.token_labels is not None
    return Row(tuple(map(len, members)), learnt, shared, len(first.labels), begin_alike(members), tagged)


def of_a_stream(config: Config, passes: Passes = apart) -> Plan:
    """Told by its first rows; those that decide the peak of memory are the longest that there may be."""
    _, renderer = tokenizer_and_renderer(config)
    data, batch = config.data, config.batch
    data = data.model_copy(update={"shuffle_buffer": min(data.shuffle_buffer, SAMPLED)})
    stream = Stream(data, renderer, None, lambda text: None, lambda text: None)
    layout = {"examples": batch.examples, "tokens": batch.tokens, "micro_tokens": batch.micro_tokens,
              "pack": batch.packing}  # fmt: skip
    try:
        with Workers(0, renderer) as workers:
            block = stream.made(0, [Place()] * len(stream.readers), layout, workers, threading.Event())
    finally:
        for reader in stream.readers:
            reader.close()
    rows = [row for step in block.plan for row in step]
    if not rows:
        return assumed(config, "assumed, as the first rows of the stream give no step", passes)
    found = _of_rows(config, rows, len(block.plan), block.documents, block.lengths, passes)
    most = assumed(config, "")
    count = len(block.documents)
    told = (
        f"told by the first {count:,} documents of the stream; memory is that of documents of "
        f"data.max_length={data.max_length} tokens"
    )
    return replace(found, rows=most.rows, steps=config.max_steps, source=told)


def answered(config: Config, passes: Passes = apart) -> Plan:
    """Of prompts that are there and answers that are as long as may be, laid out as the run will."""
    prompts = _opened(config)
    rollouts = Rollouts(config, prompts, None, lambda text: None)
    rounds = []
    for number in range(min(len(rollouts.rounds), SAMPLED)):
        asked = [document for row in rollouts.rounds[number] for document in row]
        rounds.append([np.asarray(prompt_of(config, rollouts.prompts, document)) for document in asked])
        if sum(map(len, rounds)) >= SAMPLED:
            break
    longest = config.objective.sampling.max_completion_length
    told = f"counted: {rollouts.caption}; every answer is taken to have {longest} tokens"
    made = _of_rounds(config, rounds, passes)
    return replace(made, steps=len(rollouts), source=told, bytes=8 * prompts.tokens)


def _of_rounds(config: Config, rounds: Sequence[Sequence[np.ndarray]], passes: Passes) -> Plan:
    """A plan of these prompts, round after round, whose answers differ from their first token on."""
    sampling, examples = config.objective.sampling, config.batch.examples
    assert examples is not None
    documents: list[Document] = []
    rows: list[list[int]] = []
    steps = 0
    for number, prompts in enumerate(rounds):
        first = len(documents)
        for prompt in prompts:
            for _ in range(sampling.num_generations):
                answer = np.full(sampling.max_completion_length, -1 - len(documents))  # no token of any other
                weights = np.r_[np.zeros(len(prompt)), np.ones(len(answer))].astype(np.float32)
                documents.append(Document(np.r_[prompt, answer], weights, 0))
        lengths = [document.inputs for document in documents[first:]]
        parts = min(sampling.num_mini_batches, -(-len(lengths) // examples))
        for part in range(parts):
            made = mini_batch(config, lengths, (number, 0, part), parts)
            rows += [[first + i for i in row] for row in made]
            steps += 1
    return _of_rows(config, rows, steps, documents, [document.inputs for document in documents], passes)


def assumed(config: Config, why: str, passes: Passes = apart) -> Plan:
    """Every document as long as may be and learnt whole: an upper bound of memory. Answers to one prompt share it."""
    batch, longest, kind = config.batch, config.data.max_length, config.objective.rows
    if config.objective.rolls_out:
        return _assumed_answers(config, why, passes)
    members = kinds.MEMBERS.get(kind, 1)
    fitting = max(1, batch.micro_tokens // (members * longest))
    if batch.tokens is not None:
        rows = batch.tokens / batch.micro_tokens
        lengths = [longest] * members * fitting
        if (rest := (batch.micro_tokens - fitting * members * longest) // members) > 0:
            lengths += [rest] * members
    else:
        assert batch.examples is not None
        rows = -(-batch.examples // fitting)
        lengths = [longest] * members * min(batch.examples, fitting)
    tokens = sum(lengths) * rows if batch.tokens else batch.examples * members * longest  # type: ignore[operator]
    squares = sum(n * n for n in lengths) / sum(lengths)
    source = f"{why}: every document has data.max_length={longest} tokens and is learnt whole"
    units = tuple(range(0, len(lengths) + 1, members)) if members > 1 else ()
    said = len(config.objective.scores) if config.objective.problem == SEVERAL else kinds.LABELS.get(kind, 0)
    row = Row(tuple(lengths), sum(lengths), units, said, tags=kind == "tagged")
    return Plan((row, row) if rows > 1 else (row,), rows, tokens, tokens, squares, config.max_steps, source)


def _assumed_answers(config: Config, why: str, passes: Passes) -> Plan:
    """One round of prompts that all differ, and are as long as answers leave room for."""
    room = config.data.max_length - config.objective.sampling.max_completion_length
    prompts = [np.full(room, place) for place in range(asked_at_once(config))]
    made = _of_rounds(config, [prompts], passes)
    source = f"{why}: every prompt with its answer has data.max_length={config.data.max_length} tokens"
    return replace(made, steps=config.max_steps, source=source)


def read_at_once(config: Config) -> bool:
    """Whether the data is there, and so small that it is read."""
    size = _bytes(config.data)
    return not config.data.streaming and size is not None and size <= SMALL


def _bytes(data: Data) -> int | None:
    """Of local data files; None where there is none, or something else."""
    total = 0
    paths = [entry.path for entry in data.sources()]
    for name in chain.from_iterable([path] if isinstance(path, str) else path for path in paths):
        path = Path(name).expanduser()
        if path.is_file():
            total += path.stat().st_size
        elif path.is_dir():
            total += sum(os.path.getsize(p) for p in path.rglob("*") if p.is_file())
        else:
            return None
    return total or None


def rates(config: Config, steps: int) -> list[float]:
    """The learning rate of every step."""
    peak = config.optim.learning_rate
    return [peak * factor for factor in schedule.curve(config.schedule, steps)]
