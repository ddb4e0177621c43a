"""How tensors of several models become one: sums, SLERP, TIES, DARE; pure functions.

TIES: https://arxiv.org/abs/2306.01708. DARE: https://arxiv.org/abs/2311.03099. SLERP: https://doi.org/10.1145/325165.325242.
What TIES and DARE are given are task vectors, what each model has beyond the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PARALLEL = 1 - 1e-6  # cosines beyond it: the arc is a line


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of tensors of one shape, each times its weight."""
    return torch.stack([t.float() * w for t, w in zip(tensors, weights)]).sum(0)


def slerp_weights(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    """What `a` and `b` are multiplied by at the share `t` of the arc from the direction of `a` to that of `b`:
    sin((1 - t) x) / sin x and sin(t x) / sin x, with x the angle between them."""
    x, y = a.flatten().double(), b.flatten().double()
    sizes = (x.norm() * y.norm()).item()
    cosine = (x @ y).item() / sizes if sizes else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Between two tensors, seen as vectors."""
    return linear([a, b], slerp_weights(a, b, t))


def trimmed(change: Tensor, density: float) -> Tensor:
    """The share `density` of largest size stays, all else is 0."""
    if density >= 1:
        return change.float()
    flat = change.float().flatten()
    kept = flat.abs().topk(max(1, int(density * len(flat)))).indices
    return torch.zeros_like(flat).scatter_(0, kept, flat[kept]).view_as(change)


def dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry stays with probability `density`, and is divided by it, so that the mean is what it was."""
    if density >= 1:
        return change.float()
    kept = torch.bernoulli(torch.full(change.shape, density), generator=generator).to(change.device)
    return change.float() * kept / density


def elected(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """In each place the sign of the sum is elected, and the mean taken over those that have it, times their weights."""
    stacked = torch.stack(list(changes))
    positive = stacked.sum(0) >= 0
    agree = torch.where(positive, stacked > 0, stacked < 0)
    factors = torch.tensor(list(weights), device=stacked.device).view(-1, *[1] * (stacked.ndim - 1))
    return (stacked * factors * agree).sum(0) / agree.sum(0).clamp(min=1)


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    return elected([trimmed(c, density) for c in changes], weights)


def dare(changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    return linear([dropped(c, density, generator) for c in changes], weights)


def dare_ties(
    changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    return elected([dropped(c, density, generator) for c in changes], weights)
