"""Several LoRAs of one base as one: by what they change of each layer, not by their factors.

A LoRA's factors are known up to any invertible matrix between them, so that sums or signs of theirs mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...trainable import joined
from ...trainable.adapter_files import Saved
from . import arithmetic
from .settings import OF_CHANGES, Merging
from .ways import changed


def write(found: Sequence[Saved], wanted: Merging, folder: Path) -> dict[str, Any]:
    """The merged adapter in a folder. Sums and arcs are exact, the ranks adding up. Of ties and dare, whose changes
    have full rank, it is the nearest of `rank`, and `kept` the share of their squared size that it has."""
    if wanted.by not in OF_CHANGES:
        return joined.write(_factors(found, wanted), folder) | {"kept": 1.0}
    layers, tensors = joined.checked(found), [load_file(one.tensors) for one in found]
    rank = wanted.rank or sum(getattr(one.settings, "r") for one in found)  # noqa: B009
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    whole = left = 0.0
    for layer in layers:
        change = changed(wanted, layer, _changes(found, tensors, layer))
        a, b, share = nearest(change, rank)
        size = change.square().sum().item()
        whole, left = whole + size, left + share * size
        factors[layer] = a, b
    return joined.write_factors(folder, factors, found) | {"kept": left / whole if whole else 1.0}


def _changes(found: Sequence[Saved], tensors: Sequence[dict[str, Tensor]], layer: str) -> list[Tensor]:
    """[out, in] of each; a layer that one leaves alone has zeros there."""
    changes = [joined.change(one, layer, own) for one, own in zip(found, tensors)]
    like = next(c for c in changes if c is not None)
    return [torch.zeros_like(like) if c is None else c for c in changes]


def _factors(found: Sequence[Saved], wanted: Merging) -> dict[Saved, Any]:
    weights = wanted.factors(len(found))
    if wanted.by == "linear":
        return dict(zip(found, weights))
    tensors = [load_file(one.tensors) for one in found]
    each: list[dict[str, float]] = [{}, {}]
    for layer in joined.checked(found):
        a, b = _changes(found, tensors, layer)
        for own, weight in zip(each, arithmetic.slerp_weights(a, b, weights[1] / sum(weights))):
            own[layer] = weight
    return dict(zip(found, each))


def nearest(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A [R, in] and B [out, R] whose product is the nearest of this rank to `change` [out, in], filled up with zeros
    where that has less, and the share of its squared size that they have."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    count = min(rank, len(s))
    root = s[:count].sqrt()
    a, b = torch.zeros(rank, change.shape[1]), torch.zeros(change.shape[0], rank)
    a[:count], b[:, :count] = root[:, None] * v[:count], u[:, :count] * root
    total = s.square().sum().item()
    return a, b, s[:count].square().sum().item() / total if total else 1.0
