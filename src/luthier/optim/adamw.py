"""AdamW (arXiv:1711.05101): float32 moments, and float32 masters of weights that are kept in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .. import kernels
from ..checkpoint import load_into
from . import AdamW


class MasteredAdamW:
    """Steps named parameters; gradients are multiplied by a scale on the way, never rewritten."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: AdamW):
        self.parameters, self.config = dict(parameters), config
        self.count = 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.masters: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            self.moments[name] = (torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32))
            if p.dtype != torch.float32:
                self.masters[name] = p.detach().float().contiguous()

    def decay(self, parameter: Tensor) -> float:
        """Norms and biases have one dimension and do not decay."""
        return self.config.weight_decay if parameter.ndim >= 2 else 0.0

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def step(self, learning_rate: float, scale: Tensor) -> None:
        """One step with gradients times `scale` [] on the device."""
        self.count += 1
        moved = [(name, p) for name, p in self.parameters.items() if p.grad is not None]
        plain = [(name, p) for name, p in moved if name not in self.masters]
        for decaying in (True, False):
            group = [(name, p) for name, p in plain if (p.ndim >= 2) == decaying]
            if group:
                self._fused(group, learning_rate, scale)
        for name, p in moved:
            if name in self.masters:
                self._mastered(name, p, learning_rate, scale)

    def _fused(self, group: list[tuple[str, nn.Parameter]], learning_rate: float, scale: Tensor) -> None:
        c = self.config
        parameters = [p.detach() for _, p in group]
        gradients = list(torch._foreach_mul([p.grad for _, p in group if p.grad is not None], scale))
        firsts, seconds = zip(*(self.moments[name] for name, _ in group))
        adamw(
            parameters, gradients, list(firsts), list(seconds), [],
            [torch.tensor(float(self.count - 1), device=p.device) for p in parameters],
            fused=True, amsgrad=False, beta1=c.adam_beta1, beta2=c.adam_beta2, lr=learning_rate,
            weight_decay=self.decay(parameters[0]), eps=c.adam_epsilon, maximize=False,
        )  # fmt: skip

    def _mastered(self, name: str, p: nn.Parameter, learning_rate: float, scale: Tensor) -> None:
        c, master, (m, v) = self.config, self.masters[name], self.moments[name]
        assert p.grad is not None
        if p.is_cuda and kernels.available() and p.is_contiguous():
            kernels.adamw_(
                p.detach(), master, p.grad.contiguous(), m, v, scale, lr=learning_rate, decay=self.decay(p),
                beta1=c.adam_beta1, beta2=c.adam_beta2, eps=c.adam_epsilon, step=self.count,
            )  # fmt: skip
            return
        gradient = p.grad.float() * scale
        m.lerp_(gradient, 1 - c.adam_beta1)
        v.mul_(c.adam_beta2).addcmul_(gradient, gradient, value=1 - c.adam_beta2)
        master.mul_(1 - learning_rate * self.decay(p))
        divisor = v.sqrt().div_((1 - c.adam_beta2**self.count) ** 0.5).add_(c.adam_epsilon)
        master.addcdiv_(m, divisor, value=-learning_rate / (1 - c.adam_beta1**self.count))
        p.detach().copy_(master)

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are stepped: float32 masters where there are any."""
        return {name: self.masters.get(name, p) for name, p in self.parameters.items()}

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        out = {f"master.{name}": t for name, t in self.masters.items()}
        for name, (m, v) in self.moments.items():
            out[f"exp_avg.{name}"], out[f"exp_avg_sq.{name}"] = m, v
        return out

    def numbers(self) -> dict:
        return {"count": self.count}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        load_into(self.tensors(), tensors, "optimiser")
        self.count = numbers["count"]


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by so that it is at most `max_norm`; 1 where that is 0."""
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
