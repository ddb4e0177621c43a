"""AWQ (https://arxiv.org/abs/2306.00978): inputs divided and weights multiplied by s, so that large inputs lose less.

s = mean|x|^a, with a the best of a grid by the squared change of the layer's outputs, tr(E H E^T) as in gptq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .gptq import error

STEPS = 20
FURTHEST = 1e4  # of the largest scale from the smallest


def scales(sizes: Tensor, power: float) -> Tensor:
    """[in] of mean magnitudes of inputs [in]: with a geometric middle of 1, so that weights keep their size."""
    made = sizes.float().clamp(min=1e-6).pow(power)
    made = made / (made.max() * made.min()).sqrt()
    return made.clamp(FURTHEST**-0.5, FURTHEST**0.5)


@torch.no_grad()
def search(
    weights: Sequence[Tensor], hessian: Tensor, sizes: Tensor, nearest: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, float, float]:
    """The best scales [in] of layers [out, in] that share their inputs; the error without scales and with these.

    `nearest(weight, scales)` rounds a weight that was multiplied by scales already. Power 0, no scaling, is among what
    is tried, so the result is never worse.
    """
    before, best, least = 0.0, torch.ones_like(sizes), float("inf")
    for step in range(STEPS):
        s = scales(sizes, step / STEPS)
        found = sum(error(nearest(w * s, s) / s - w, hessian) for w in weights)
        if step == 0:
            before = found
        if found < least:
            best, least = s, found
    return best, before, least
