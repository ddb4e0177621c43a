"""Lion (arXiv:2302.06675): the sign of an interpolated momentum, one slot."""

from __future__ import annotations

from torch import Tensor

from .rule import Rule, Slots, zeros


class LionRule(Rule):
    def __init__(self, beta1: float, beta2: float):
        self.beta1, self.beta2 = beta1, beta2

    def slots(self, parameter: Tensor) -> Slots:
        return {"exp_avg": zeros(parameter)}

    def update(self, weight: Tensor, gradient: Tensor, slots: Slots, lr: float, decay: float, count: int) -> None:
        m = slots["exp_avg"]
        weight.mul_(1 - lr * decay)
        weight.sub_(m.lerp(gradient, 1 - self.beta1).sign_(), alpha=lr)
        m.lerp_(gradient, 1 - self.beta2)
