"""Averages of the weights over steps: they are evaluated and exported, while training goes on from the weights.

Moving average: Polyak and Juditsky 1992; mean of the last steps: stochastic weight averaging, arXiv:1803.05407.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint import load_into
from . import EMA, LastAverage


class Average:
    """float32 averages of named weights; `count` updates have been made, of which the first takes the weights over."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.count = 0
        self.mean = {name: w.detach().to(torch.float32, copy=True) for name, w in weights.items()}

    def share(self, step: int) -> float:
        """What the weights after `step` are worth in the average, 0 to leave them out."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after `step`, counted from 1."""
        share = self.share(step)
        if not share:
            return
        self.count += 1
        for name, mean in self.mean.items():
            mean.lerp_(weights[name].detach().float(), share)

    def weights(self) -> dict[str, Tensor] | None:
        """The averages, or None before the first update."""
        return self.mean if self.count else None

    def tensors(self) -> dict[str, Tensor]:
        return self.mean

    def numbers(self) -> dict:
        return {"count": self.count}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        load_into(self.mean, tensors, "averaging")
        self.count = numbers["count"]


class MovingAverage(Average):
    """mean <- d mean + (1 - d) w, d at most (1 + n) / (10 + n) in update n: the start is soon forgotten."""

    def __init__(self, config: EMA, weights: Mapping[str, Tensor]):
        super().__init__(weights)
        self.config = config

    def share(self, step: int) -> float:
        if step % self.config.every:
            return 0.0
        return 1 - min(self.config.decay, (1 + self.count) / (10 + self.count))


class LastMean(Average):
    """The plain mean over the last steps of `total`."""

    def __init__(self, config: LastAverage, weights: Mapping[str, Tensor], total: int):
        super().__init__(weights)
        self.every = config.every
        last = math.ceil(config.steps * total) if config.steps < 1 else int(config.steps)
        self.first = max(1, total - last + 1)

    def share(self, step: int) -> float:
        if step < self.first or (step - self.first) % self.every:
            return 0.0
        return 1 / (self.count + 1)
