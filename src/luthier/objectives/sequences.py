"""Log-probabilities of whole documents: sums over what is learnt of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..logprobs import logprob_of, rowwise

REFERENCE = "reference"  # the field with the log-probabilities of the network as it was at the start


def reference_of(objective: Any, batch: Batch) -> Tensor:
    """[N] log-probabilities by the network as it was at the start: those computed ahead, or else now."""
    known = batch.token_fields.get(REFERENCE)
    if known is not None:
        return known[batch.trained]
    assert objective.reference is not None, "an objective that compares is given the reference, or values of ahead.py"
    with objective.reference() as start:
        return objective.ahead(start, batch)[REFERENCE]


@contextmanager
def unmoved(network: Any) -> Iterator[None]:
    """The network as it is, without gradients and without what is random in training."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


def token_logprobs(network: Any, batch: Batch) -> Tensor:
    """[N] of each learnt token, with gradients; no more than a chunk of logits exists."""
    hidden, targets, _ = network.predictions(batch, network.hidden(batch))
    return rowwise(hidden, network.head, logprob_of, targets)


def sums(batch: Batch, values: Tensor) -> Tensor:
    """[D] sums over the learnt tokens of each document, of values [N]; the same every time, on a GPU too."""
    # Laid out as rows, as adding up by index has no order on a GPU.
    table = values.new_zeros(batch.documents, max(batch.lengths))
    return table.index_put((batch.owners(), batch.positions[batch.trained]), values).sum(1)


def counts(batch: Batch) -> Tensor:
    """[D] how many tokens of each are learnt."""
    return sums(batch, torch.ones(len(batch.trained), device=batch.trained.device))
