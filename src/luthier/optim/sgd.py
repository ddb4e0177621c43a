"""Stochastic gradient descent, with heavy-ball or Nesterov momentum."""

from __future__ import annotations

from torch import Tensor

from .rule import Rule, Slots, zeros


class SGDRule(Rule):
    def __init__(self, momentum: float, nesterov: bool):
        self.momentum, self.nesterov = momentum, nesterov

    def slots(self, parameter: Tensor) -> Slots:
        return {"momentum": zeros(parameter)} if self.momentum else {}

    def update(self, weight: Tensor, gradient: Tensor, slots: Slots, lr: float, decay: float, count: int) -> None:
        weight.mul_(1 - lr * decay)
        if self.momentum:
            buffer = slots["momentum"].mul_(self.momentum).add_(gradient)
            gradient = gradient.add_(buffer, alpha=self.momentum) if self.nesterov else buffer
        weight.sub_(gradient, alpha=lr)
