"""Early stopping (Prechelt 1998): end a run after so many evaluations that brought nothing better."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import EarlyStopping


class Patience:
    """Counts evaluations since the best one; `better` is 1 where greater is better, else -1."""

    def __init__(self, config: EarlyStopping, better: int):
        self.config, self.better = config, better
        self.best: float | None = None
        self.waited = 0

    def observe(self, value: float) -> None:
        if self.best is None or self.better * (value - self.best) > self.config.threshold:
            self.best, self.waited = value, 0
        else:  # also of what is not a number
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        return self.waited >= self.config.patience

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def numbers(self) -> dict:
        return {"best": self.best, "waited": self.waited}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        self.best, self.waited = numbers["best"], numbers["waited"]
