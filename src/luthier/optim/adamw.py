"""AdamW (arXiv:1711.05101), fused over all parameters of a group where PyTorch or our kernel can."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .. import kernels
from .rule import Item, Now, Rule, Slots, zeros


class AdamWRule(Rule):
    def __init__(self, beta1: float, beta2: float, epsilon: float):
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon

    def slots(self, parameter: Tensor) -> Slots:
        return {"exp_avg": zeros(parameter), "exp_avg_sq": zeros(parameter)}

    def update(self, weight: Tensor, gradient: Tensor, slots: Slots, lr: float, decay: float, count: int) -> None:
        self.move(weight, gradient, slots["exp_avg"], slots["exp_avg_sq"], lr, decay, count)

    def move(
        self, weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, lr: float, decay: float, count: int
    ) -> None:  # fmt: skip
        m.lerp_(gradient, 1 - self.beta1)
        v.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        weight.mul_(1 - lr * decay)
        divisor = v.sqrt().div_((1 - self.beta2**count) ** 0.5).add_(self.epsilon)
        weight.addcdiv_(m, divisor, value=-lr / (1 - self.beta1**count))

    def fast(self, items: list[Item], now: Now) -> list[Item]:
        plain = [item for item in items if item.plain]
        if plain:
            self._fused(plain, now)
        rest = []
        for item in items:
            p = item.parameter
            if item.plain:
                continue
            if p.is_cuda and kernels.available() and p.is_contiguous():
                self._kernel(item, now)
            else:
                rest.append(item)
        return rest

    def _fused(self, items: list[Item], now: Now) -> None:
        """All float32 parameters of a group in one call of PyTorch's."""
        parameters = [item.parameter.detach() for item in items]
        raw = [item.parameter.grad for item in items if item.parameter.grad is not None]
        gradients = list(torch._foreach_mul(raw, now.scale))
        if now.clip is not None:
            for item, gradient in zip(items, gradients):
                now.clipped(item, gradient)
        adamw(
            parameters, gradients, [i.slots["exp_avg"] for i in items], [i.slots["exp_avg_sq"] for i in items], [],
            [torch.tensor(float(i.count - 1), device=i.parameter.device) for i in items],
            fused=True, amsgrad=False, beta1=self.beta1, beta2=self.beta2, lr=now.learning_rate,
            weight_decay=now.decay, eps=self.epsilon, maximize=False,
        )  # fmt: skip

    def _kernel(self, item: Item, now: Now) -> None:
        p, gradient, scale = item.parameter, item.parameter.grad, now.scale
        assert gradient is not None
        if now.clip is not None:
            gradient, scale = now.gradient(item), torch.ones_like(now.scale)
        kernels.adamw_(
            p.detach(), item.master, gradient.contiguous(), item.slots["exp_avg"], item.slots["exp_avg_sq"], scale,
            lr=now.learning_rate, decay=now.decay, beta1=self.beta1, beta2=self.beta2, eps=self.epsilon,
            step=item.count, seed=item.seed,
        )  # fmt: skip
