"""Rule: how one optimiser changes one parameter; all else about optimisers is in `optimizer.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Slots = dict[str, Tensor]


@dataclass
class Item:
    """A parameter that is due, with all that belongs to it."""

    name: str
    parameter: nn.Parameter
    master: Tensor | None  # float32, of a parameter in 16 bits that has one
    slots: Slots
    count: int  # the parameter's steps, this one included
    seed: int | None  # of stochastic rounding; None rounds to the nearest

    @property
    def plain(self) -> bool:
        """Whether the parameter itself is float32."""
        return self.parameter.dtype == torch.float32


@dataclass(frozen=True)
class Now:
    """One step of the parameters of one group."""

    learning_rate: float
    decay: float
    scale: Tensor  # [] what gradients are multiplied by
    clip: Callable[[str, Tensor, Tensor], None] | None  # (name, gradient, weight), in place

    def gradient(self, item: Item) -> Tensor:
        """The mean gradient in float32, clipped: a copy, gradients are never rewritten."""
        assert item.parameter.grad is not None
        gradient = item.parameter.grad.float() * self.scale
        self.clipped(item, gradient)
        return gradient

    def clipped(self, item: Item, gradient: Tensor) -> None:
        if self.clip is not None:
            weight = item.parameter.detach() if item.master is None else item.master
            self.clip(item.name, gradient, weight)


class Rule:
    """A rule is its state for one parameter and its arithmetic on float32."""

    def slots(self, parameter: Tensor) -> Slots:
        """The state of a parameter before its first step, on its device; saved in every checkpoint."""
        return {}

    def update(self, weight: Tensor, gradient: Tensor, slots: Slots, lr: float, decay: float, count: int) -> None:
        """One step of `weight` float32 and its slots, in place; `count` is 1 at the parameter's first step.

        The gradient may be written over.
        """
        raise NotImplementedError

    def fast(self, items: list[Item], now: Now) -> list[Item]:
        """Step together those for which there is a quicker way; the rest is returned."""
        return items

    def begin(self, factor: float) -> None:
        """Before each step of the run; `factor` is what the schedule makes of the peak rates."""

    def averaged(self, weight: Tensor, slots: Slots) -> Tensor | None:
        """The weight to evaluate and to export, where that is not the one that is trained."""
        return None

    def numbers(self) -> dict:
        return {}

    def restore(self, numbers: Mapping) -> None:
        pass


def zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32)
