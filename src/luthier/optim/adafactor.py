"""Adafactor (arXiv:1804.04235): the second moments of a matrix from those of its rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Adafactor
from .rule import Rule, Slots, zeros


class AdafactorRule(Rule):
    def __init__(self, config: Adafactor):
        self.config = config

    def slots(self, parameter: Tensor) -> Slots:
        made: Slots = {}
        if parameter.ndim >= 2:
            shape = parameter.shape
            made["exp_avg_sq_row"] = torch.zeros(shape[:-1], device=parameter.device)
            made["exp_avg_sq_col"] = torch.zeros(shape[:-2] + shape[-1:], device=parameter.device)
        else:
            made["exp_avg_sq"] = zeros(parameter)
        if self.config.beta1 is not None:
            made["exp_avg"] = zeros(parameter)
        return made

    def update(self, weight: Tensor, gradient: Tensor, slots: Slots, lr: float, decay: float, count: int) -> None:
        c = self.config
        if c.scale_parameter:
            # A tensor: the size of the weights stays on the device.
            rate = lr * root_mean_square(weight).clamp_min(c.scale_epsilon)
        else:
            rate = torch.tensor(lr, device=weight.device)
        new = count**c.decay_rate
        squares = gradient.square().add_(c.adafactor_epsilon)
        if weight.ndim >= 2:
            rows, columns = slots["exp_avg_sq_row"], slots["exp_avg_sq_col"]
            rows.lerp_(squares.mean(-1), new)
            columns.lerp_(squares.mean(-2), new)
            update = gradient * (rows / rows.mean(-1, keepdim=True)).rsqrt_()[..., None] * columns.rsqrt()[..., None, :]
        else:
            update = gradient * slots["exp_avg_sq"].lerp_(squares, new).rsqrt()
        update.div_((root_mean_square(update) / c.clip_threshold).clamp_min(1.0)).mul_(rate)
        if c.beta1 is not None:
            update = slots["exp_avg"].lerp_(update, 1 - c.beta1)
        weight.mul_(1 - rate * decay).sub_(update)


def root_mean_square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values) / values.numel() ** 0.5
