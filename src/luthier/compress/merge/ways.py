"""The table of ways: tensors of several models, or what they change of a base, into one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import arithmetic
from .settings import OF_CHANGES, Merging


def generator(seed: int, name: str) -> torch.Generator:
    """What is dropped of a tensor follows from the seed and its name, not from the order of tensors."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def changed(wanted: Merging, name: str, changes: Sequence[Tensor]) -> Tensor:
    """What several changes of a tensor of this name come to, by ties or dare."""
    weights, draw = wanted.factors(len(changes)), generator(wanted.seed, name)
    if wanted.by == "ties":
        return arithmetic.ties(changes, weights, wanted.kept)
    way = arithmetic.dare if wanted.by == "dare" else arithmetic.dare_ties
    return way(changes, weights, wanted.kept, draw)


def merged(wanted: Merging, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """The tensor of this name of the merged model."""
    if wanted.by in OF_CHANGES:
        assert base is not None, "checked with the sources"
        return base.float() + changed(wanted, name, [t.float() - base.float() for t in tensors])
    weights = wanted.factors(len(tensors))
    if wanted.by == "slerp":
        return arithmetic.slerp(tensors[0], tensors[1], weights[1] / sum(weights))
    return arithmetic.linear(tensors, weights)
