"""Reward model: minus the log-probability that the better conversation wins, as Bradley and Terry have it.

The loss is that of arXiv:1706.03741 and arXiv:2204.05862, with the margin of arXiv:2307.09288.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch, Loss
from .reward import BradleyTerry


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log s(c - r - m), of scores [U] each."""
    return -F.logsigmoid(chosen - rejected - margin)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(c + r)^2: differences alone leave open where the scores' zero is (arXiv:2312.09244)."""
    return (chosen + rejected) ** 2


def won(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the better one scores more, one half where both score the same."""
    return (chosen > rejected).to(chosen) + 0.5 * (chosen == rejected)


class RewardObjective(nn.Module):
    """Rows of two documents, the better one first; what is counted is pairs."""

    metrics: tuple[str, ...] = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

    def __init__(self, config: BradleyTerry):
        super().__init__()
        self.centre = config.center_rewards_coefficient or 0.0

    def prepare(self, network: Any, batch: Batch) -> Batch:
        return batch

    def forward(self, network: Any, batch: Batch) -> Loss:
        loss, told = self._each(network, batch)
        total = loss.sum()
        return Loss(total, total.new_tensor(len(loss)), {name: column.sum() for name, column in told.items()})

    @torch.no_grad()
    def evaluate(self, network: Any, batch: Batch) -> Loss:
        """The same of each pair [U]."""
        loss, told = self._each(network, batch)
        return Loss(loss, torch.ones_like(loss), told)

    def _each(self, network: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """[U] the loss of each pair, and what is told of it, under the names that preference methods have."""
        scores = network.scores(batch)[: batch.documents, 0].float()  # [2 U]
        chosen, rejected = scores.view(-1, 2).unbind(1)
        margins = batch.fields.get("labels")
        loss = bradley_terry(chosen, rejected, 0.0 if margins is None else margins[:, 0])
        if self.centre:
            loss = loss + self.centre * centring(chosen, rejected)
        better, worse = chosen.detach(), rejected.detach()
        return loss, {
            "rewards/chosen": better, "rewards/rejected": worse, "rewards/margins": better - worse,
            "rewards/accuracies": won(better, worse),
        }  # fmt: skip
