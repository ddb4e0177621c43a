"""Next-token prediction: weighted cross-entropy over the learnt tokens of packed documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..batch import Batch, Loss
from ..logprobs import nll_sum, scored
from . import NextToken


class NextTokenObjective(nn.Module):
    passes = 1  # optimiser steps for each prepared batch

    def __init__(self, config: NextToken):
        super().__init__()
        self.smoothing = config.label_smoothing_factor

    def prepare(self, network: Any, batch: Batch) -> Batch:
        return batch

    def forward(self, network: Any, batch: Batch) -> Loss:
        hidden, targets, weights = network.predictions(batch, network.hidden(batch))
        return Loss(nll_sum(hidden, network.head, targets, weights, self.smoothing), weights.sum(), {})

    @torch.no_grad()
    def evaluate(self, network: Any, batch: Batch) -> Loss:
        """The same loss, and how many learnt tokens were the likeliest ones."""
        hidden, targets, weights = network.predictions(batch, network.hidden(batch))
        logprobs, hits = scored(hidden, network.head, targets)
        return Loss(-(logprobs * weights).sum(), weights.sum(), {"token_accuracy": (hits * weights).sum()})
