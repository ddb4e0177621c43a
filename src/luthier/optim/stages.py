"""Optimisers of parameters that begin to move at different steps: each stage has its own, made when it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import AdamW
from .adamw import MasteredAdamW

Parameters = Mapping[str, nn.Parameter]


class Stages:
    """Looks like one optimiser; a stage's moments, masters and count start at its step and take no memory before.

    One optimiser for all would correct the bias of late moments by a count of steps that they have not seen.
    """

    def __init__(self, make: Callable[[Parameters], Any], parameters: Parameters, begins: Mapping[str, int]):
        self.make = make
        self.waiting: dict[int, dict[str, nn.Parameter]] = {}
        for name, p in parameters.items():
            self.waiting.setdefault(begins.get(name, 0), {})[name] = p
        self.begun: dict[int, Any] = {}
        self.begin(0)

    def begin(self, step: int) -> None:
        """Make the optimisers of what moves after `step` optimiser steps."""
        for first in sorted(f for f in self.waiting if f <= step):
            self.begun[first] = self.make(self.waiting.pop(first))

    def gradients(self) -> list[Tensor]:
        return [g for optimizer in self.begun.values() for g in optimizer.gradients()]

    def step(self, learning_rate: float, scale: Tensor) -> None:
        for optimizer in self.begun.values():
            optimizer.step(learning_rate, scale)

    def zero_grad(self) -> None:
        for optimizer in self.begun.values():
            optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        return {f"{first}:{n}": t for first, optimizer in self.begun.items() for n, t in optimizer.tensors().items()}

    def numbers(self) -> dict:
        return {str(first): optimizer.numbers() for first, optimizer in self.begun.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        """After the weights were restored, as a stage's masters are made from them."""
        for first in numbers:
            self.begin(int(first))
            mine = {n.partition(":")[2]: t for n, t in tensors.items() if n.partition(":")[0] == first}
            self.begun[int(first)].restore(mine, numbers[first])


def build(config: AdamW, parameters: Parameters, begins: Mapping[str, int]) -> MasteredAdamW | Stages:
    """The optimiser of a run; `begins` gives the step of those parameters that begin to move later."""

    def make(parameters: Parameters) -> MasteredAdamW:
        return MasteredAdamW(parameters, config)

    return Stages(make, parameters, begins) if begins else make(parameters)
