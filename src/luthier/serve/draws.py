"""The next token of each row: every request with its own temperature, bounds, mask and seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..generate import PARTS, distribution, drawn

CANDIDATES = 256  # likeliest tokens that are looked at first: to sort a whole vocabulary takes long


@dataclass(frozen=True)
class Wish:
    """How one row is drawn, and what is told of it."""

    temperature: float
    top_p: float
    top_k: int
    uniform: float  # in [0, 1): what is drawn
    allowed: Tensor | None = None  # bool [V]
    logprobs: int | None = None


@dataclass(frozen=True)
class Drawn:
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: str | None = None  # then the token means nothing


def draw(logits: Tensor, wishes: Sequence[Wish]) -> list[Drawn]:
    """A token of each row of logits [R, V]."""
    logits = logits.float()
    shown = logits
    for row, wish in enumerate(wishes):
        if wish.allowed is not None:
            if shown is logits:
                logits = logits.clone()
            logits[row].masked_fill_(~wish.allowed.to(logits.device), float("-inf"))
    best, likeliest = logits.max(-1)
    tokens = likeliest.tolist()
    groups: dict[tuple[float, float, int], list[int]] = defaultdict(list)
    for row, wish in enumerate(wishes):
        if wish.temperature > 0:
            groups[wish.temperature, wish.top_p, wish.top_k].append(row)
    finite = best.isfinite().tolist()
    for (temperature, top_p, top_k), rows in groups.items():
        uniforms = torch.tensor([wishes[row].uniform for row in rows], device=logits.device)
        own = logits if len(rows) == len(wishes) else logits[rows]
        if not all(finite[row] for row in rows):
            own = own.nan_to_num(0.0, 0.0, 0.0)  # of these an error is told, and the others are drawn
        for row, token in zip(rows, _sampled(own, temperature, top_p, top_k, uniforms).tolist()):
            tokens[row] = token
    told = _told(shown, tokens, wishes)
    for row, wish in enumerate(wishes):
        if not finite[row]:
            mask = wish.allowed is not None and not bool(wish.allowed.any())
            told[row] = Drawn(tokens[row], error="no token is allowed" if mask else "the model's scores are not finite")
    return told


def _sampled(logits: Tensor, temperature: float, top_p: float, top_k: int, uniforms: Tensor) -> Tensor:
    """As `drawn` of `distribution` has it, without sorting more than the likeliest."""
    vocabulary = logits.shape[-1]
    few = 0 < top_k < vocabulary
    if (top_p == 1 and not few) or vocabulary <= CANDIDATES:
        return drawn(distribution(logits, temperature, top_p, top_k), uniforms)
    scaled = logits / temperature
    values, order = scaled.topk(top_k if few else CANDIDATES)
    total = values.logsumexp(-1, keepdim=True) if few else scaled.logsumexp(-1, keepdim=True)
    whole = ((values - total).exp().double() * PARTS).long()  # likeliest first
    before = whole.cumsum(-1) - whole
    enough = before[:, -1] + whole[:, -1] >= top_p * PARTS if top_p < 1 else torch.ones_like(uniforms, dtype=torch.bool)
    if top_p < 1:
        whole = whole.masked_fill(before >= top_p * PARTS, 0)
    order, places = order.sort(-1)  # what a number means goes by the vocabulary's order
    whole = whole.gather(-1, places)
    sums = whole.cumsum(-1)
    at = (uniforms.double() * sums[:, -1]).long()
    chosen = order.gather(-1, torch.searchsorted(sums, at[:, None], right=True))[:, 0]
    if not few and not bool(enough.all()):
        rest = (~enough).nonzero()[:, 0]
        chosen[rest] = drawn(distribution(logits[rest], temperature, top_p, top_k), uniforms[rest])
    return chosen


def _told(logits: Tensor, tokens: list[int], wishes: Sequence[Wish]) -> list[Drawn]:
    """With log-probabilities of the model itself where they are wanted."""
    made = [Drawn(token) for token in tokens]
    wanted = [row for row, wish in enumerate(wishes) if wish.logprobs is not None]
    if not wanted:
        return made
    logprobs = logits[wanted].log_softmax(-1)
    most = min(max(wishes[row].logprobs or 0 for row in wanted), logits.shape[-1])
    top = logprobs.topk(most) if most else None
    for i, row in enumerate(wanted):
        pairs: tuple[tuple[int, float], ...] = ()
        if top is not None:
            n = min(wishes[row].logprobs or 0, most)
            pairs = tuple(zip(top.indices[i, :n].tolist(), top.values[i, :n].tolist()))
        made[row] = Drawn(tokens[row], float(logprobs[i, tokens[row]]), pairs)
    return made
