"""Schedule-free AdamW (arXiv:2405.15682): gradients at y, steps of z, and x, the average of z, is the result.

The parameter is y = beta1 x + (1 - beta1) z and z is a slot, so that x is known from the two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import ScheduleFreeAdamW
from .rule import Rule, Slots, zeros


class ScheduleFreeRule(Rule):
    def __init__(self, config: ScheduleFreeAdamW):
        self.config = config
        self.count, self.largest, self.weights, self.share = 0, 0.0, 0.0, 1.0

    def slots(self, parameter: Tensor) -> Slots:
        return {"z": parameter.detach().to(torch.float32, copy=True), "exp_avg_sq": zeros(parameter)}

    def begin(self, factor: float) -> None:
        """How much of the average the new z becomes: its weight among those of all steps.

        The weights come from the schedule's factor alone, as that of the peak rate cancels.
        """
        self.count += 1
        self.largest = max(self.largest, factor)
        weight = self.count**self.config.r * self.largest**self.config.weight_lr_power
        self.weights += weight
        self.share = weight / self.weights if self.weights else 0.0

    def update(self, weight: Tensor, gradient: Tensor, slots: Slots, lr: float, decay: float, count: int) -> None:
        c, z, v = self.config, slots["z"], slots["exp_avg_sq"]
        v.mul_(c.adam_beta2).addcmul_(gradient, gradient, value=1 - c.adam_beta2)
        gradient.div_(v.sqrt().div_((1 - c.adam_beta2**count) ** 0.5).add_(c.adam_epsilon))
        gradient.add_(weight, alpha=decay)  # decays y, as the paper does
        weight.lerp_(z, self.share).sub_(gradient, alpha=lr * (1 - c.adam_beta1 * (1 - self.share)))
        z.sub_(gradient, alpha=lr)

    def averaged(self, weight: Tensor, slots: Slots) -> Tensor:
        """x = y + (1 / beta1 - 1)(y - z)"""
        return weight + (weight - slots["z"]) * (1 / self.config.adam_beta1 - 1)

    def numbers(self) -> dict:
        return {"count": self.count, "largest": self.largest, "weights": self.weights}

    def restore(self, numbers: Mapping) -> None:
        self.count, self.largest, self.weights = numbers["count"], numbers["largest"], numbers["weights"]
