"""The steps of a run in numbers: rows, tokens and the schedule; counted where the data is small, else assumed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from ..assemble import tokenizer_and_renderer
from ..batch import begin_alike
from ..config import Config
from ..data import Data, kinds
from ..data.dataset import Dataset, open_rows
from ..data.stream import Plan as Steps
from ..errors import LuthierError
from ..labels import SEVERAL
from ..models.names import TRAIN
from ..optim import schedule

WITH_LABELS = ("labelled", "tagged")  # kinds of rows of which no token is predicted
SMALL = 4 << 20  # bytes of data files that are read and tokenised, a few seconds' work


@dataclass(frozen=True)
class Row:
    """The shape of one pass through the network."""

    lengths: tuple[int, ...]  # tokens of each document
    learnt: int  # tokens that something is learnt at
    units: tuple[int, ...] = ()  # cumulative documents of each row of the data; () where each has one
    labels: int = 0  # numbers that are said of each row of the data
    alike: tuple[int, ...] = ()  # with how many tokens each document begins as the one before it does; () is 0
    tags: bool = False  # whether something is said of its tokens

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Plan:
    """What a run will pass through the network, as far as it is known."""

    rows: tuple[Row, ...]  # the largest, which decides the peak of memory, and others of a step
    rows_per_step: float
    tokens_per_step: float
    squares_per_token: float  # sum of squared lengths over sum of lengths: what attention costs
    steps: int | None
    source: str  # how the figures above were come by
    bytes: int = 0  # of the documents in memory

    @property
    def largest(self) -> Row:
        return max(self.rows, key=lambda row: (row.tokens, row.learnt))

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


def made_plan(config: Config, count: bool = True) -> Plan:
    """Counted from the data where its files are small, else assumed from the settings."""
    size = _bytes(config.data)
    if config.data.streaming:
        return assumed(config, "assumed, as a stream is read while it is learnt")
    if config.objective.rolls_out:
        return assumed(config, "assumed, as answers are yet to be given")
    if config.model.tokenizer == TRAIN:
        return assumed(config, "assumed, as the tokenizer is yet to be trained")
    if not count or size is None or size > SMALL:
        why = "no small local data was given" if size is None else f"the data has {size / 1e6:.0f} MB"
        return assumed(config, f"assumed, as {why}" if count else "assumed")
    try:
        return counted(config)
    except (LuthierError, ImportError) as error:  # a folder with a config.json only has no tokenizer
        return assumed(config, f"assumed, as the data cannot be counted: {str(error).splitlines()[0]}")


def counted(config: Config) -> Plan:
    _, renderer = tokenizer_and_renderer(config)
    training, _ = open_rows(config.data, renderer, None, lambda text: None, lambda text: None)
    assert isinstance(training, Dataset)
    batch, lengths = config.batch, training.lengths
    steps = training.plan(
        examples=batch.examples, tokens=batch.tokens, micro_tokens=batch.micro_tokens, pack=batch.packing,
        seed=config.data.seed, epochs=config.epochs, max_steps=config.max_steps,
    )
    rows = [row for step in steps for row in step]

    def shape(row: list[int]) -> Row:
        documents = [training.documents[d] for d in row]
        learnt = sum(int((document.weights > 0).sum()) for document in documents)
        members = [member.tokens[: member.inputs] for document in documents for member in document.members]
        units = (0, *accumulate(len(document.starts) for document in documents))
        first = documents[0]
        shared = units if len(members) > len(row) else ()
        tagged = first.token_labels is not None
        return Row(tuple(map(len, members)), learnt, shared, len(first.labels), begin_alike(members), tagged)

    def slots(row: list[int]) -> tuple[int, int]:
        taken = sum(lengths[d] for d in row) if batch.packing else max(lengths[d] for d in row) * len(row)
        return taken, sum(lengths[d] ** 2 for d in row)

    total = sum(lengths[d] for row in rows for d in row)
    some = [*rows[:2], max(rows, key=slots)]  # a heap is fragmented by rows of different lengths
    squares = sum(lengths[d] ** 2 for row in rows for d in row)
    return Plan(
        tuple(shape(row) for row in some), len(rows) / len(steps), total / len(steps), squares / total, len(steps),
        f"counted: {plan_line(training, steps, batch.micro_tokens)}", 8 * training.tokens,
    )  # fmt: skip


def assumed(config: Config, why: str) -> Plan:
    """Every document as long as may be and learnt whole: an upper bound of memory."""
    batch, longest, kind = config.batch, config.data.max_length, config.objective.rows
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
    learnt = sum(lengths)
    if config.objective.rolls_out:
        learnt = len(lengths) * min(longest, config.objective.sampling.max_completion_length)
        source = f"{why}: every prompt with its answer has data.max_length={longest} tokens"
    row = Row(tuple(lengths), learnt, units, said, tags=kind == "tagged")
    return Plan((row, row) if rows > 1 else (row,), rows, tokens, squares, config.max_steps, source)


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
