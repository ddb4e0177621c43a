"""Tokens that neighbours in a packed row begin with, run once: where each token stands in the shorter row, and back.

The two answers to a prompt see the same keys and values of it, and nothing of one another: a document's keys are those
of its start, wherever they stand, and its own. Queries stand in the row once, so borders of queries and of keys differ.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SHARE = 8  # graphs see at most so many lengths of a row, and keys are copied where this part of it is saved


class Copies(NamedTuple):
    """Where each of N tokens stands in a row of K, in which what documents share stands once."""

    index: Tensor  # [N]
    order: Tensor  # [N] the N sorted by where they stand; last those that only fill up
    place: Tensor  # [N] where they stand, in this order; K of those that only fill up
    first: Tensor  # [K] where in this order the copies of a token begin
    rounds: int  # 2 ** rounds is no less than the copies of any token


class Once(NamedTuple):
    """A row in which what documents share stands once."""

    kept: Tensor  # [K] the tokens that are run; what the row is filled up with repeats the first
    copies: Copies  # where each stands that was in the row before, and more that only fill up
    ends: tuple[int, ...]  # borders of documents in the row
    keys: tuple[int, ...]  # borders of documents with their starts


def once(
    keys: tuple[int, ...], alike: tuple[int, ...], device: torch.device, least: int = 1, total: int = 0,
    longest: int = 1,
) -> Once | None:  # fmt: skip
    """The row that is run for documents that end at `keys`; None where less than `least` tokens are saved.

    K and N depend on little but `total`, if that is given: K has `SHARE` steps. Then it is filled up with documents of
    at most `longest` tokens that nobody asks for, and `total` is that of the row before, with what filled it up.
    """
    ends = [0]
    for (a, b), shared in zip(pairwise(keys), alike):
        ends.append(ends[-1] + b - a - shared)
    own = torch.ones(keys[-1], dtype=torch.bool)
    for start, shared in zip(keys, alike):
        own[start : start + shared] = False
    index, kept = paths(tuple(ends), keys), own.nonzero()[:, 0]
    size, slots = len(kept), len(own)
    if total:
        unit = -(-total // SHARE)
        size, slots = -(-size // unit) * unit, total + unit
    if max(total, len(own)) - size < least:
        return None
    for a in range(len(kept), size, longest):
        b = min(a + longest, size)
        index = torch.cat([index, torch.arange(a, b)])
        keys, ends = (*keys, len(index)), [*ends, b]
    kept = torch.cat([kept, kept.new_zeros(size - len(kept))])
    return Once(_moved(kept, device), _copies(index, size, slots, device), tuple(ends), keys)


def paths(ends: tuple[int, ...], keys: tuple[int, ...]) -> Tensor:
    """[N] where each document's tokens stand in a row: first those that it shares with the document before it."""
    index, before = torch.arange(keys[-1]), 0
    for (a, b), (start, stop) in zip(pairwise(ends), pairwise(keys)):
        own = stop - (b - a)
        index[start:own] = index[before : before + own - start].clone()
        index[own:stop] = torch.arange(a, b)
        before = start
    return index


def _copies(index: Tensor, size: int, slots: int, device: torch.device) -> Copies:
    """Of `slots` tokens, of which those after `index` fill up."""
    rest = torch.zeros(slots - len(index), dtype=torch.int64)
    place, order = torch.sort(torch.cat([index, rest + size]), stable=True)
    counts = torch.bincount(index, minlength=size)
    first = torch.cumsum(counts, 0) - counts
    index, order, place, first = (_moved(t, device) for t in (torch.cat([index, rest]), order, place, first))
    return Copies(index, order, place, first, (int(counts.max()) - 1).bit_length())


def _moved(t: Tensor, device: torch.device) -> Tensor:
    return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)


def copied(tokens: Tensor, copies: Copies) -> Tensor:
    """[N, ...] of tokens [K, ...]."""
    return _Copied.apply(tokens, *copies)  # type: ignore[return-value]


class _Copied(torch.autograd.Function):
    """A gather. Backward, copies of a token are added in a fixed order, by halves: the same every time."""

    @staticmethod
    def forward(ctx, tokens, index, order, place, first, rounds):
        ctx.save_for_backward(order, place, first)
        ctx.rounds = rounds
        return tokens.index_select(0, index)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        order, place, first = ctx.saved_tensors
        sums = upstream.index_select(0, order).float()
        for step in (1 << i for i in range(ctx.rounds)):
            same = (place[step:] == place[:-step]).view(-1, *[1] * (sums.ndim - 1))
            sums = torch.cat([sums[:-step] + torch.where(same, sums[step:], 0), sums[-step:]])
        return sums.index_select(0, first).to(upstream.dtype), None, None, None, None, None
