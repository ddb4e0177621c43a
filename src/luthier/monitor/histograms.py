"""Histograms of weights and gradients, counted where they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .trackers import Histogram

BINS = 64
AT_ONCE = 1 << 24  # elements that are binned at a time: their bins take 8 bytes each


@torch.no_grad()
def histogram(tensor: Tensor, factor: Tensor | float = 1.0) -> Histogram:
    """64 equal bins from the least to the largest value of `tensor` times `factor`, the last one closed."""
    flat = tensor.detach().flatten()
    low, high = (float(v * factor) for v in torch.aminmax(flat))
    if low == high:  # one value: a bin around it
        low, high = low - 0.5, high + 0.5
    counts = torch.zeros(BINS, dtype=torch.int64, device=flat.device)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    squares = torch.zeros_like(total)
    for part in flat.split(AT_ONCE):
        values = part.float() * factor
        places = ((values - low) / (high - low) * BINS).long().clamp_(0, BINS - 1)
        counts += torch.bincount(places, minlength=BINS)  # of integers: deterministic on a GPU, unlike histc
        total += values.sum(dtype=torch.float64)
        squares += values.square().sum(dtype=torch.float64)
    edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    return Histogram(counts.tolist(), edges, total.item(), squares.item())


def of_step(parameters: Mapping[str, nn.Parameter], scale: Tensor) -> dict[str, Histogram]:
    """Of all weights that move, and of their gradients times `scale` []."""
    found = {}
    for name, p in parameters.items():
        found[f"weights/{name}"] = histogram(p)
        if p.grad is not None:
            found[f"gradients/{name}"] = histogram(p.grad, scale)
    return found
