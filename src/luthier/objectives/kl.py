"""Estimates of a KL divergence from sampled tokens (joschu.net/blog/kl-approx.html), and a coefficient that follows one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """[N] of KL(policy, reference) at tokens that were drawn from the policy, l = logprobs - reference.

    k1, l: no bias, but often negative and its gradient is 0 on average. k2, l^2 / 2: small bias, the gradient of the
    true KL on average. k3, exp(-l) - 1 + l: no bias, never negative, little variance while the two are close.
    """
    l = logprobs.float() - reference.float()  # noqa: E741
    return {"k1": lambda: l, "k2": lambda: l * l / 2, "k3": lambda: torch.expm1(-l) + l}[kind]()


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
