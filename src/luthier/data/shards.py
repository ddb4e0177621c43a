"""Documents and their conversations as a few flat arrays: in memory, or mapped from safetensors files."""

from __future__ import annotations

import bisect
import hashlib
import json
import mmap
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..document import Document
from .conversations import Conversation

Arrays = Mapping[str, np.ndarray]


def flattened(documents: Sequence[tuple[Document, int]], conversations: Sequence[Conversation]) -> dict:
    """The arrays of a shard, of documents [D] with the places of their conversations [C].

    Weights are kept as runs of equal ones, exactly and for any values: an answer is one run, however long.
    """
    runs = [_runs(d.weights) for d, _ in documents]
    texts = [json.dumps(vars(c), default=str).encode() for c in conversations]

    def ends(lengths: Sequence[int]) -> np.ndarray:
        return np.cumsum([0, *lengths], dtype=np.int64)

    def joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

    return {
        "tokens": joined([d.tokens for d, _ in documents], np.int32),  # [T]
        "ends": ends([len(d.tokens) for d, _ in documents]),  # [D + 1]
        "run_weights": joined([values for values, _ in runs], np.float32),  # [R]
        "run_lengths": joined([lengths for _, lengths in runs], np.int32),  # [R]
        "run_ends": ends([len(values) for values, _ in runs]),  # [D + 1]
        "rows": np.asarray([d.row for d, _ in documents], np.int64),  # [D]
        "inputs": np.asarray([d.inputs for d, _ in documents], np.int32),  # [D]
        "trained": np.asarray([np.count_nonzero(d.weights) for d, _ in documents], np.int32),  # [D]
        "starts": joined([np.asarray(d.starts, np.int32) for d, _ in documents], np.int32),  # [M] in their document
        "start_ends": ends([len(d.starts) for d, _ in documents]),  # [D + 1]
        "labels": joined([np.asarray(d.labels, np.float32) for d, _ in documents], np.float32),  # [K]
        "label_ends": ends([len(d.labels) for d, _ in documents]),  # [D + 1]
        "types": _types([d for d, _ in documents]),  # [T], or [0] where none is of a second text
        "cut": np.asarray([d.cut for d, _ in documents], np.int32),  # [D]
        "token_labels": joined([d.token_labels for d, _ in documents if d.token_labels is not None], np.int32),  # [T]
        "parents": np.asarray([parent for _, parent in documents], np.int32),  # [D] which conversation
        "texts": np.frombuffer(b"".join(texts), np.uint8),  # the conversations as JSON, end to end
        "text_ends": ends([len(text) for text in texts]),  # [C + 1]
    }


def _types(documents: Sequence[Document]) -> np.ndarray:
    if all(d.types is None for d in documents):
        return np.zeros(0, np.int32)
    return np.concatenate([np.zeros_like(d.tokens) if d.types is None else d.types for d in documents]).astype(np.int32)


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    return values[starts], np.diff(np.r_[starts, len(values)])


def digest_of(arrays: Arrays) -> str:
    """Changes with any token, weight or label of any document."""
    made = hashlib.sha256()
    names = ["ends", "tokens", "run_ends", "run_lengths", "run_weights"]
    if len(arrays["starts"]) > len(arrays["rows"]):
        names += ["start_ends", "starts"]
    if len(arrays["labels"]) or len(arrays["token_labels"]):
        names += ["label_ends", "labels", "token_labels"]
    if len(arrays["types"]):
        names.append("types")
    for name in names:
        made.update(np.ascontiguousarray(arrays[name]).data)
    return made.hexdigest()


def mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, read from the disk when they are looked at."""
    kinds = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "U8": np.uint8}
    with open(path, "rb") as file:
        raw = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:start].tobytes())
    return {
        name: raw[start + about["data_offsets"][0] : start + about["data_offsets"][1]].view(kinds[about["dtype"]])
        for name, about in header.items()
        if name != "__metadata__"
    }


@dataclass(frozen=True)
class Shard:
    """Consecutive documents; `before` is added to their row numbers where several sources are one data set."""

    arrays: Arrays
    digest: str
    before: int = 0

    def __len__(self) -> int:
        return len(self.arrays["rows"])

    def document(self, place: int) -> Document:
        a = self.arrays
        runs, tokens = self._span("run_ends", place), self._span("ends", place)
        starts, labels = self._span("start_ends", place), self._span("label_ends", place)
        return Document(
            a["tokens"][tokens],
            np.repeat(a["run_weights"][runs], a["run_lengths"][runs]),
            int(a["rows"][place]) + self.before,
            tuple(a["starts"][starts].tolist()),
            tuple(a["labels"][labels].tolist()),
            a["token_labels"][tokens] if len(a["token_labels"]) else None,
            a["types"][tokens] if len(a["types"]) else None,
            int(a["cut"][place]),
        )

    def _span(self, ends: str, place: int) -> slice:
        """Of a document in the arrays whose ends are these."""
        return slice(int(self.arrays[ends][place]), int(self.arrays[ends][place + 1]))

    def conversation(self, place: int) -> Conversation:
        a = self.arrays
        parent = int(a["parents"][place])
        text = a["texts"][int(a["text_ends"][parent]) : int(a["text_ends"][parent + 1])]
        return Conversation(**json.loads(text.tobytes()))


class _Chosen(Sequence):
    """What the documents `chosen` of some shards have; all of them without `chosen`."""

    def __init__(self, shards: Sequence[Shard], chosen: np.ndarray | None = None):
        self.shards, self.chosen = list(shards), chosen
        self.starts = [0, *accumulate(len(shard) for shard in shards)]

    def __len__(self) -> int:
        return self.starts[-1] if self.chosen is None else len(self.chosen)

    def _gathered(self, name: str) -> np.ndarray:
        """One number of each document, [D]."""
        parts = [np.diff(s.arrays["ends"]) if name == "length" else s.arrays[name] for s in self.shards]
        joined = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return joined if self.chosen is None else joined[self.chosen]

    def _of(self, shard: Shard, place: int) -> Any:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self) if self.chosen is None else int(self.chosen[index])
        shard = bisect.bisect_right(self.starts, index) - 1
        return self._of(self.shards[shard], index - self.starts[shard])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class Documents(_Chosen):
    """Documents, made when they are asked for."""

    def _of(self, shard: Shard, place: int) -> Document:
        return shard.document(place)

    def rows(self) -> np.ndarray:
        """[D] the row that each document is of."""
        parts = [np.asarray(shard.arrays["rows"], np.int64) + shard.before for shard in self.shards]
        gathered = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return gathered if self.chosen is None else gathered[self.chosen]

    def lengths(self) -> array:
        """How many tokens of each are run; four bytes a document."""
        made = array("i")
        made.frombytes(np.ascontiguousarray(self._gathered("inputs"), np.int32).tobytes())
        return made

    def labels(self) -> np.ndarray:
        """[D, K] what is said of each row."""
        parts = [shard.arrays["labels"].reshape(len(shard), -1) for shard in self.shards if len(shard)]
        joined = np.concatenate(parts)
        return joined if self.chosen is None else joined[self.chosen]

    def members(self) -> np.ndarray:
        """[D] how many texts each document is of."""
        joined = np.concatenate([np.diff(shard.arrays["start_ends"]) for shard in self.shards])
        return joined if self.chosen is None else joined[self.chosen]

    def tokens(self) -> int:
        return int(self._gathered("length").sum())

    def trained_tokens(self) -> int:
        return int(self._gathered("trained").sum(dtype=np.int64))

    def cut(self) -> int:
        """How many of them lack tokens of their rows."""
        return int(np.count_nonzero(self._gathered("cut")))

    def select(self, indices: Sequence[int] | np.ndarray) -> Documents:
        chosen = np.asarray(indices, np.int64)
        return Documents(self.shards, chosen if self.chosen is None else self.chosen[chosen])

    def fingerprint(self) -> str:
        """Changes with any token or weight of any row, and with which of them are chosen."""
        made = hashlib.sha256()
        for shard in self.shards:
            made.update(shard.digest.encode())
        if self.chosen is not None:
            made.update(np.ascontiguousarray(self.chosen).data)
        return made.hexdigest()[:16]

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Documents:
        """Of documents that are there already, without conversations."""
        arrays = flattened([(document, 0) for document in documents], [])
        return cls([Shard(arrays, digest_of(arrays))])


class Conversations(_Chosen):
    """What the documents were made from."""

    def _of(self, shard: Shard, place: int) -> Conversation:
        return shard.conversation(place)
