"""Batch: packed rows of tokens and what is learnt of them. Loss: a sum and its denominator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .document import Document


class Known(NamedTuple):
    """With how many tokens each document begins as the one before it does, of these tokens and no others."""

    tokens: Tensor  # [T]
    alike: tuple[int, ...]  # [D]


def begin_alike(documents: Sequence[np.ndarray]) -> tuple[int, ...]:
    """With how many tokens each document begins as the one before it does, the last of its own not among them."""
    found = [0] if documents else []
    for before, document in pairwise(documents):
        most = max(0, min(len(before), len(document) - 1))
        different = np.flatnonzero(before[:most] != document[:most])
        found.append(int(different[0]) if len(different) else most)
    return tuple(found)


@dataclass(frozen=True)
class Batch:
    """Documents end to end, each up to its last position that predicts something learnt.

    A row of the data with several members is as many documents here, neighbours that no split parts. `ends` stays on
    the host, as the shapes of the work depend on it.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, restarting at 0 in each document
    ends: tuple[int, ...]  # [D + 1] cumulative lengths, from 0 to T
    targets: Tensor  # [T] int64, the token after each
    weights: Tensor  # [T] float32, of predicting it; 0 where nothing is learnt
    trained: Tensor  # [N] int64, where weights are not 0
    rows: tuple[int, ...] = ()  # [U] numbers of the rows of the data
    units: tuple[int, ...] = ()  # [U + 1] cumulative documents of each row; () where each has one
    fields: dict[str, Tensor] = field(default_factory=dict)  # [U, ...] of the rows; `labels` [U, K], more by objectives
    token_fields: dict[str, Tensor] = field(default_factory=dict)  # [T, ...] of predicting the token after each
    fillers: int = 0  # documents at the end that teach nothing, and are of no row
    known: Known | None = None  # what `alike` is, where tokens are on a device

    @classmethod
    def pack(cls, documents: Sequence[Document]) -> Batch:
        members = [member for document in documents for member in document.members]
        lengths = [member.inputs for member in members]
        assert all(d.weights[0] == 0 for d in members), "nothing predicts a document's first token"

        def joined(parts: list[np.ndarray], dtype: type) -> Tensor:
            return torch.from_numpy(np.concatenate(parts).astype(dtype))

        def following(values: np.ndarray, length: int) -> np.ndarray:
            if length < len(values):
                return values[1 : length + 1]
            return np.concatenate([values[1:], np.zeros_like(values[:1])])

        def shifted(parts: list[np.ndarray], dtype: type) -> Tensor:
            return joined([following(part, n) for part, n in zip(parts, lengths)], dtype)

        weights = shifted([d.weights for d in members], np.float32)
        fields, token_fields = {}, {}
        units = (0, *np.cumsum([len(d.starts) for d in documents]).tolist())
        if documents[0].labels:
            fields["labels"] = torch.tensor([d.labels for d in documents], dtype=torch.float32)
        for name in documents[0].fields:
            token_fields[name] = shifted([d.fields[name] for d in members], members[0].fields[name].dtype.type)
        if documents[0].token_labels is not None:  # of the tokens themselves
            labels = [d.token_labels for d in members if d.token_labels is not None]
            token_fields["labels"] = joined([each[:n] for each, n in zip(labels, lengths)], np.int64)
        if any(d.types is not None for d in members):
            types = [np.zeros(n, np.int32) if d.types is None else d.types[:n] for d, n in zip(members, lengths)]
            token_fields["types"] = joined(types, np.int64)
        return cls(
            tokens=joined([d.tokens[:n] for d, n in zip(members, lengths)], np.int64),
            targets=shifted([d.tokens for d in members], np.int64),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            ends=(0, *np.cumsum(lengths).tolist()),
            weights=weights,
            trained=weights.nonzero()[:, 0],
            rows=tuple(d.row for d in documents),
            units=() if len(members) == len(documents) else units,
            fields=fields,
            token_fields=token_fields,
        )

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.ends, self.ends[1:])]

    def alike(self) -> tuple[int, ...]:
        """[D] with how many tokens a document begins as the one before it does, each having one more of its own.

        Tokens on a device are not compared: there it is what was known of these very tokens on the host, or nothing.
        """
        if self.known is not None and self.known.tokens is self.tokens:
            return self.known.alike
        if self.tokens.device.type != "cpu":
            return (0,) * (len(self.ends) - 1)
        tokens = self.tokens.numpy()
        return begin_alike([tokens[a:b] for a, b in zip(self.ends, self.ends[1:])])

    @property
    def documents(self) -> int:
        """D, of the rows; what fills the batch up is none."""
        return len(self.ends) - 1 - self.fillers

    def owners(self) -> Tensor:
        """[N] the document of each trained position."""
        ends = torch.tensor(self.ends[1:], device=self.trained.device)
        return torch.bucketize(self.trained, ends, right=True)

    def to(self, device: torch.device) -> Batch:
        def move(t: Tensor) -> Tensor:
            if device.type == "cuda" and t.device.type == "cpu":
                t = t.pin_memory()
            return t.to(device, non_blocking=True)

        tokens = move(self.tokens)
        return replace(
            self,
            tokens=tokens,
            known=Known(tokens, self.alike()),
            positions=move(self.positions),
            targets=move(self.targets),
            weights=move(self.weights),
            trained=move(self.trained),
            fields={name: move(t) for name, t in self.fields.items()},
            token_fields={name: move(t) for name, t in self.token_fields.items()},
        )

    def select(self, start: int, stop: int) -> Batch:
        """The rows start..stop-1."""
        first, last = (self.units[start], self.units[stop]) if self.units else (start, stop)
        a, b = self.ends[first], self.ends[last]
        weights, tokens = self.weights[a:b], self.tokens[a:b]
        return Batch(
            tokens=tokens,
            known=Known(tokens, (0, *self.alike()[first + 1 : last])),
            positions=self.positions[a:b],
            targets=self.targets[a:b],
            ends=tuple(e - a for e in self.ends[first : last + 1]),
            weights=weights,
            trained=weights.nonzero()[:, 0],
            rows=self.rows[start:stop],
            units=tuple(u - first for u in self.units[start : stop + 1]) if self.units else (),
            fields={name: t[start:stop] for name, t in self.fields.items()},
            token_fields={name: t[a:b] for name, t in self.token_fields.items()},
        )

    def members(self, number: int) -> Batch | None:
        """Of each row its member of this number alone, of rows that have it; None where no row does.

        Of a batch that was filled up, filled up again, so that shapes stay few.
        """
        units = self.units or tuple(range(self.documents + 1))
        chosen = [u for u in range(len(units) - 1) if units[u] + number < units[u + 1]]
        if not chosen:
            return None
        places = [units[u] + number for u in chosen]
        spans = [range(self.ends[d], self.ends[d + 1]) for d in places]
        at = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(self.tokens.device)
        rows = torch.tensor(chosen, device=self.tokens.device)
        weights = self.weights[at]
        if weights.is_meta:  # shapes only: as many as the share of the tokens
            trained = self.trained[: max(1, len(self.trained) * len(at) // len(self))]
        else:
            trained = weights.nonzero()[:, 0]
        tokens = self.tokens[at]
        known = Known(tokens, _alike_at(self.alike(), places)) if tokens.device.type != "cpu" else None
        made = Batch(
            tokens=tokens,
            known=known,
            positions=self.positions[at],
            targets=self.targets[at],
            ends=(0, *accumulate(map(len, spans))),
            weights=weights,
            trained=trained,
            rows=tuple(self.rows[u] for u in chosen),
            fields={name: t[rows] for name, t in self.fields.items()},
            token_fields={name: t[at] for name, t in self.token_fields.items()},
        )
        unit = -(-len(self) // 8)
        return made.padded_to(-(-len(made) // unit) * unit) if self.fillers else made

    def split(self, micro_tokens: int) -> list[Batch]:
        """Consecutive parts of at most `micro_tokens` tokens each, or of one row where it alone is longer."""
        assert not self.fillers, "split before filling up"
        ends = [self.ends[u] for u in self.units] if self.units else self.ends  # of the rows
        parts, start = [], 0
        for stop in range(1, len(ends)):
            if stop + 1 == len(ends) or ends[stop + 1] - ends[start] > micro_tokens:
                parts.append(self.select(start, stop))
                start = stop
        return parts

    def padded_to(self, total: int) -> Batch:
        """One more document of zeros, from which nothing is learnt, so that the row has `total` tokens."""
        extra = total - len(self)
        if extra <= 0:
            return self
        device = self.tokens.device
        zeros = torch.zeros(extra, dtype=torch.int64, device=device)
        tokens = torch.cat([self.tokens, zeros])
        return replace(
            self,
            tokens=tokens,
            known=Known(tokens, (*self.alike(), 0)),
            positions=torch.cat([self.positions, torch.arange(extra, device=device)]),
            ends=(*self.ends, total),
            targets=torch.cat([self.targets, zeros]),
            weights=torch.cat([self.weights, torch.zeros(extra, device=device)]),
            token_fields={n: torch.cat([t, t.new_zeros(extra, *t.shape[1:])]) for n, t in self.token_fields.items()},
            fillers=self.fillers + 1,
        )


def _alike_at(alike: Sequence[int], places: Sequence[int]) -> tuple[int, ...]:
    """At least with how many tokens the documents of these places begin alike, told by those between them."""
    return (0, *(min(alike[a + 1 : b + 1]) for a, b in pairwise(places)))


class Loss(NamedTuple):
    """`total / count` is the mean; the loop divides once, by the count over all micro-batches and ranks."""

    total: Tensor  # [] differentiable
    count: Tensor  # [] what the total is to be divided by
    metrics: dict[str, Tensor]  # sums, to be divided by the same count; names as the log has them


def rectangles(order: Sequence[int], lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Consecutive documents, in an order of rising length, whose padded rectangle has at most `micro_tokens` slots."""
    rows: list[list[int]] = [[]]
    for i in order:
        if rows[-1] and lengths[i] * (len(rows[-1]) + 1) > micro_tokens:
            rows.append([])
        rows[-1].append(i)
    return rows
