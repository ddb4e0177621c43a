"""Next-token prediction: weighted cross-entropy over the learnt tokens of packed documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch, Loss
from ..logprobs import nll_sum, scored
from .next_token import NextToken


class NextTokenObjective(nn.Module):
    metrics: tuple[str, ...] = ()

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
        """The same loss of each document [D], its learnt tokens that were the likeliest, its surprise unweighted."""
        hidden, targets, weights = network.predictions(batch, network.hidden(batch))
        logprobs, hits = scored(hidden, network.head, targets)
        owners = batch.owners()

        def of_documents(values: Tensor) -> Tensor:
            sums = torch.zeros(batch.documents, dtype=torch.float64, device=owners.device)
            return sums.index_add_(0, owners, values.double())

        weights, nll = weights.double(), -logprobs.double()
        return Loss(
            of_documents(nll * weights), of_documents(weights),
            {"token_accuracy": of_documents(hits * weights), "nll": of_documents(nll)},
        )  # fmt: skip
