"""Batch: packed rows of tokens and what is learnt of them. Loss: a sum and its denominator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .document import Document


@dataclass(frozen=True)
class Batch:
    """Documents end to end, each up to its last position that predicts something learnt.

    `ends` stays on the host, as the shapes of the work depend on it.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, restarting at 0 in each document
    ends: tuple[int, ...]  # [D + 1] cumulative lengths, from 0 to T
    targets: Tensor  # [T] int64, the token after each
    weights: Tensor  # [T] float32, of predicting it; 0 where nothing is learnt
    trained: Tensor  # [N] int64, where weights are not 0
    rows: tuple[int, ...] = ()  # [D] numbers of the documents in their data
    fields: dict[str, Tensor] = field(default_factory=dict)  # [T, ...] or [D, ...], what an objective adds

    @classmethod
    def pack(cls, documents: Sequence[Document]) -> Batch:
        lengths = [document.inputs for document in documents]
        assert all(d.weights[0] == 0 for d in documents), "nothing predicts a document's first token"

        def joined(parts: list[np.ndarray], dtype: type) -> Tensor:
            return torch.from_numpy(np.concatenate(parts).astype(dtype))

        def following(values: np.ndarray, length: int) -> np.ndarray:
            return values[1 : length + 1] if length < len(values) else np.append(values[1:], 0)

        weights = joined([following(d.weights, n) for d, n in zip(documents, lengths)], np.float32)
        return cls(
            tokens=joined([d.tokens[:n] for d, n in zip(documents, lengths)], np.int64),
            targets=joined([following(d.tokens, n) for d, n in zip(documents, lengths)], np.int64),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            ends=(0, *np.cumsum(lengths).tolist()),
            weights=weights,
            trained=weights.nonzero()[:, 0],
            rows=tuple(d.row for d in documents),
        )

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.ends, self.ends[1:])]

    def shared_start(self) -> int:
        """With how many equal tokens all documents begin, each having one more; 0 of a single document."""
        least = min(self.lengths) - 1
        if len(self.ends) < 3 or least < 1:
            return 0
        heads = self.tokens[torch.tensor(self.ends[:-1])[:, None] + torch.arange(least)]  # [D, least]
        return int((heads == heads[0]).all(0).cumprod(0).sum())

    def to(self, device: torch.device) -> Batch:
        def move(t: Tensor) -> Tensor:
            if device.type == "cuda" and t.device.type == "cpu":
                t = t.pin_memory()
            return t.to(device, non_blocking=True)

        return replace(
            self,
            tokens=move(self.tokens),
            positions=move(self.positions),
            targets=move(self.targets),
            weights=move(self.weights),
            trained=move(self.trained),
            fields={name: move(t) for name, t in self.fields.items()},
        )

    def select(self, start: int, stop: int) -> Batch:
        """The documents start..stop-1."""
        a, b = self.ends[start], self.ends[stop]
        weights = self.weights[a:b]
        total, documents = self.ends[-1], len(self.ends) - 1

        def cut(t: Tensor) -> Tensor:
            assert len(t) in (total, documents), "a field has one entry for each token or for each document"
            return t[a:b] if len(t) == total else t[start:stop]

        return Batch(
            tokens=self.tokens[a:b],
            positions=self.positions[a:b],
            targets=self.targets[a:b],
            ends=tuple(e - a for e in self.ends[start : stop + 1]),
            weights=weights,
            trained=weights.nonzero()[:, 0],
            rows=self.rows[start:stop],
            fields={name: cut(t) for name, t in self.fields.items()},
        )

    def split(self, micro_tokens: int) -> list[Batch]:
        """Consecutive parts of at most `micro_tokens` tokens each, or of one document where it alone is longer."""
        parts, start = [], 0
        for stop in range(1, len(self.ends)):
            last = stop + 1 == len(self.ends)
            if last or self.ends[stop + 1] - self.ends[start] > micro_tokens:
                parts.append(self.select(start, stop))
                start = stop
        return parts

    def padded_to(self, total: int) -> Batch:
        """One more document of zeros, from which nothing is learnt, so that the row has `total` tokens."""
        extra = total - len(self)
        if extra <= 0:
            return self
        assert not self.fields, "pad before an objective adds its fields"
        zeros = torch.zeros(extra, dtype=torch.int64)
        return replace(
            self,
            tokens=torch.cat([self.tokens, zeros]),
            positions=torch.cat([self.positions, torch.arange(extra)]),
            ends=(*self.ends, total),
            targets=torch.cat([self.targets, zeros]),
            weights=torch.cat([self.weights, torch.zeros(extra)]),
        )


class Loss(NamedTuple):
    """`total / count` is the mean; the loop divides once, by the count over all micro-batches and ranks."""

    total: Tensor  # [] differentiable
    count: Tensor  # [] what the total is to be divided by
    metrics: dict[str, Tensor]  # sums, to be divided by the same count


def rectangles(order: Sequence[int], lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Consecutive documents, in an order of rising length, whose padded rectangle has at most `micro_tokens` slots."""
    rows: list[list[int]] = [[]]
    for i in order:
        if rows[-1] and lengths[i] * (len(rows[-1]) + 1) > micro_tokens:
            rows.append([])
        rows[-1].append(i)
    return rows
