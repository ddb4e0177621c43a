"""Muon (kellerjordan.github.io/posts/muon): momentum whose singular values are all made about one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Muon
from .rule import Rule, Slots, zeros

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the steepest quintic at zero that keeps values near one


class MuonRule(Rule):
    def __init__(self, config: Muon):
        self.config = config

    def slots(self, parameter: Tensor) -> Slots:
        return {"momentum": zeros(parameter)}

    def update(self, weight: Tensor, gradient: Tensor, slots: Slots, lr: float, decay: float, count: int) -> None:
        c = self.config
        buffer = slots["momentum"].lerp_(gradient, 1 - c.momentum)
        update = orthogonalised(gradient.lerp_(buffer, c.momentum) if c.nesterov else buffer, c.ns_steps)
        rows, columns = weight.shape[-2:]
        if c.adjust_lr_fn == "original":
            adjusted = lr * max(1, rows / columns) ** 0.5
        else:
            adjusted = lr * 0.2 * max(rows, columns) ** 0.5
        weight.mul_(1 - lr * decay)
        weight.sub_(update.to(weight.dtype), alpha=adjusted)


def orthogonalised(matrix: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """U V' of matrix [..., rows, columns] = U S V', roughly, by Newton-Schulz iterations.

    They are made in bfloat16 where that is fast, in float32 elsewhere.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype or (torch.bfloat16 if matrix.is_cuda else torch.float32))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)  # no singular value above one
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
