"""Rows to documents, a stretch of rows at a time: the one way by which every data set and stream is made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..document import Document
from .conversations import BadRow, Conversation
from .formats import FORMATS, converted
from .kinds import finished, render
from .masks import Rendered, Renderer
from .shards import Shard, digest_of, flattened
from .sources import Row

STRETCH_ROWS, STRETCH_SIZE = 4096, 4 << 20  # rows of a shard, and roughly their characters: the memory that it takes
TOGETHER_ROWS, TOGETHER_SIZE = 1000, 1 << 18  # given to the tokenizer at once: its offsets take 100 bytes a token


@dataclass(frozen=True)
class Fault:
    row: int
    place: str
    kind: str
    detail: str


class Task(NamedTuple):
    """Rows to tokenise; with `path`, the shard is written there."""

    rows: Sequence[Row]
    form: str
    columns: Mapping[str, str]
    path: Path | None = None


class Made(NamedTuple):
    """What became of them. The arrays of a shard that was written stand in its file only."""

    shard: Shard
    faults: list[Fault]


def stretches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Consecutive rows for one shard each. Where they are cut depends on the rows alone."""
    waiting: list[Row] = []
    size = 0
    for row in rows:
        waiting.append(row)
        size += size_of(row.values)
        if len(waiting) >= STRETCH_ROWS or size >= STRETCH_SIZE:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def size_of(value: object) -> int:
    """Roughly the characters of a row."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return 8


def tokenise(task: Task, renderer: Renderer) -> Made:
    """Convert, render, mask and tokenise rows; those from which nothing right can be learnt become faults."""
    faults: list[Fault] = []
    documents: list[tuple[Document, int]] = []
    conversations: list[Conversation] = []
    waiting: list[tuple[Row, Conversation, Rendered]] = []

    def flush() -> None:
        results: Sequence[Any] = renderer.documents([(row.number, rendered) for row, _, rendered in waiting])
        for (row, conversation, _), result in zip(waiting, results):
            if isinstance(result, BadRow):
                faults.append(Fault(row.number, row.place, result.kind, result.detail))
                continue
            documents.extend((document, len(conversations)) for document in result)  # several of a long text
            conversations.append(conversation)
        waiting.clear()

    size = 0
    for row in task.rows:
        try:
            conversation = converted(row, FORMATS[task.form], task.columns)
            rendered = render(renderer, conversation)
        except BadRow as fault:
            faults.append(Fault(row.number, row.place, fault.kind, fault.detail))
            continue
        waiting.append((row, conversation, rendered))
        size += len(rendered.text)
        if len(waiting) >= TOGETHER_ROWS or size >= TOGETHER_SIZE:
            flush()
            size = 0
    flush()
    faults.sort(key=lambda fault: fault.row)
    arrays = flattened(finished(renderer, documents), conversations)
    shard = Shard(arrays, digest_of(arrays))
    if task.path is not None:
        _write(arrays, task.path)
        shard = Shard({}, shard.digest)
    return Made(shard, faults)


def _write(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(dict(arrays), path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
