"""Answers that are liked or not: KTO, whose reference point is a mean over all rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch, Loss
from . import preference_losses as losses
from .preference import KTO
from .sequences import REFERENCE, reference_of, sums, token_logprobs, unmoved


class KTOObjective(nn.Module):
    """Rows of an answer and, as a second document, the same prompt with another row's answer; what is counted is rows.

    The reference point z is max(0, mean of log-ratios over the second documents of the whole step, on all ranks): it is
    the same however the step is cut. `rewards/chosen` and the like are means over the rows that are liked, and others.
    """

    metrics: tuple[str, ...] = (
        "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl",
    )  # fmt: skip

    def __init__(self, config: KTO):
        super().__init__()
        self.config = config
        self.reference: Any = None  # () -> context of the network as it was at the start; given by assemble
        self.point: Tensor | None = None  # [] z of the step at hand
        self.shares: Tensor | None = None  # [2] of the rows that are not liked, and that are

    def ahead(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """[N] log-probabilities of both answers, by the network as it was at the start."""
        return {REFERENCE: token_logprobs(network, batch)}

    def survey(self, network: Any, batches: Iterable[Batch], sum_: Callable[[Tensor], Tensor]) -> None:
        """The reference point and the shares of liked rows, of a whole step; without gradients or dropout."""
        told = torch.zeros(4, device=network.device)  # log-ratios, how many; rows that are not liked, and that are
        for batch in batches:
            liked = batch.fields["labels"][:, 0]
            told[2:] += torch.stack([(1 - liked).sum(), liked.sum()])
            strangers = batch.members(1)
            if strangers is not None:
                with unmoved(network):
                    ratios = sums(strangers, token_logprobs(network, strangers) - reference_of(self, strangers))
                told[:2] += torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))])
        told = sum_(told)
        self.point = (told[0] / told[1].clamp(min=1)).clamp(min=0)
        self.shares = told[2:] / told[2:].sum()

    def prepare(self, network: Any, batch: Batch) -> Batch:
        own = batch.members(0)
        assert own is not None
        return replace(own, fields=own.fields | {REFERENCE: sums(own, reference_of(self, own))})

    def forward(self, network: Any, batch: Batch) -> Loss:
        loss, told = self._judged(network, batch)
        total = loss.sum()
        return Loss(total, total.new_tensor(len(loss)), {name: told[name].sum() for name in self.metrics})

    @torch.no_grad()
    def evaluate(self, network: Any, batch: Batch) -> Loss:
        """The same of each row [U], and whether it lies on the right side of the reference point."""
        loss, told = self._judged(network, self.prepare(network, batch))
        return Loss(loss, torch.ones_like(loss), told)

    def _judged(self, network: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """[U] losses, and what is told of each row, such that means over all rows are those over the liked, and others.

        Where a step has no row of a sort, its means are 0.
        """
        assert self.point is not None, "a step is surveyed before it is learnt"
        assert self.shares is not None
        config, liked = self.config, batch.fields["labels"][:, 0] > 0
        logps = sums(batch, token_logprobs(network, batch))
        ratios = logps - batch.fields[REFERENCE]
        loss = losses.kto(ratios, liked, self.point, config.beta, config.desirable_weight, config.undesirable_weight)
        weights = torch.stack([~liked, liked]) / self.shares.clamp(min=1e-9)[:, None]  # [2, U]
        reward = config.beta * ratios.detach() * weights
        logps = logps.detach() * weights
        side = losses.ahead_of(ratios.detach(), self.point)
        return loss, {
            "rewards/chosen": reward[1], "rewards/rejected": reward[0], "rewards/margins": reward[1] - reward[0],
            "logps/chosen": logps[1], "logps/rejected": logps[0], "kl": self.point.expand(len(loss)),
            "rewards/accuracies": torch.where(liked, side, 1 - side),
        }  # fmt: skip
