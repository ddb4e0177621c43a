"""The coefficient of a KL penalty: fixed, or one that follows the KL that is seen (arXiv:1909.08593)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Coefficient:
    """Of a KL penalty: fixed, or drawn to where the KL of whole answers is `target` (arXiv:1909.08593, section 2.2).

    It is a part of the checkpoint.
    """

    def __init__(self, value: float, target: float | None = None, horizon: int = 1):
        self.value, self.target, self.horizon = value, target, horizon

    def observe(self, kl: float, answers: int) -> None:
        """The mean KL of `answers` answers, in nats: by at most a fifth too much or too little of it is acted on."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * answers / self.horizon

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def numbers(self) -> dict:
        return {"value": self.value}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        self.value = float(numbers["value"])
