"""The arithmetic of preference losses: functions of log-probabilities, a number for each pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid(margin: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(beta m) - e log s(-beta m): DPO (arXiv:2305.18290), with e > 0 cDPO. All are [U]."""
    loss = -F.logsigmoid(beta * margin)
    return (1 - smoothing) * loss - smoothing * F.logsigmoid(-beta * margin) if smoothing else loss


def hinge(margin: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """max(0, 1 - beta m), of SLiC (arXiv:2305.10425) with the normalisation of RSO (arXiv:2309.06657)."""
    return torch.relu(1 - beta * margin)


def ipo(margin: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """(m - 1 / (2 tau))^2, equation 17 of arXiv:2310.12036, on a margin of means over tokens."""
    return (margin - 1 / (2 * beta)) ** 2


def robust(margin: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """What the loss of the right order is expected to be where a share e of pairs is turned round (arXiv:2403.00409).

    (-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2 e); it has no lower bound.
    """
    right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)


LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "robust": robust,
}  # fmt: skip


def log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean), the likelihood of a token in the geometric mean (arXiv:2403.07691)."""
    # 1 - exp(m) loses its digits near m = 0, log1p(-exp(m)) where m is far from it: log(-expm1(m)) is for the former.
    near = mean > -0.6931
    low = torch.where(near, mean.new_full((), -1.0), mean)
    high = torch.where(near, mean, mean.new_full((), -0.5)).clamp(max=-1e-7)  # an answer that is certain
    return mean - torch.where(near, (-torch.expm1(high)).log(), torch.log1p(-low.exp()))


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log s(log odds of the better - log odds of the worse), of means over tokens."""
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def kto(ratio: Tensor, desirable: Tensor, kl: Tensor, beta: float, weight: float, other: float) -> Tensor:
    """w (1 - s(beta (r - z))) where an answer is desirable, w' (1 - s(beta (z - r))) where not (arXiv:2402.01306).

    `ratio` [U] are log-ratios of policy and reference, `desirable` [U] booleans, `kl` [] is the reference point z >= 0.
    """
    value = beta * (ratio - kl)
    return torch.where(desirable, weight * torch.sigmoid(-value), other * torch.sigmoid(value))


def ahead_of(one: Tensor, other: Tensor) -> Tensor:
    """1 where one is larger, 0 where it is smaller, one half where they are equal, as at the reference."""
    return (torch.sign(one - other) + 1) / 2
