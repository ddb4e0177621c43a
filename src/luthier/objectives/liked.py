"""Answers that are liked or not: KTO, whose reference point is a mean over all rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    the same however the step is cut. `rewards/chosen` and the like are means over the rows that are liked, and others;
    where there is no such row, there is no such mean.
    """

    metrics: tuple[str, ...] = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl", "liked")

    def __init__(self, config: KTO):
        super().__init__()
        self.config = config
        self.reference: Any = None  # () -> context of the network as it was at the start; given by assemble
        self.point: Tensor | None = None  # [] z of the step at hand

    def ahead(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """[N] log-probabilities of both answers, by the network as it was at the start."""
        return {REFERENCE: token_logprobs(network, batch)}

    def survey(self, network: Any, batches: Iterable[Batch], sum_: Callable[[Tensor], Tensor]) -> None:
        """The reference point of a whole step; without gradients or dropout."""
        told = torch.zeros(2, device=network.device)  # log-ratios, how many
        for batch in batches:
            strangers = batch.members(1)
            if strangers is not None:
                with unmoved(network):
                    ratios = sums(strangers, token_logprobs(network, strangers) - reference_of(self, strangers))
                told += torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))])
        told = sum_(told)
        self.point = (told[0] / told[1].clamp(min=1)).clamp(min=0)

    def prepare(self, network: Any, batch: Batch) -> Batch:
        own = batch.members(0)
        assert own is not None
        return replace(own, fields=own.fields | {REFERENCE: sums(own, reference_of(self, own))})

    def forward(self, network: Any, batch: Batch) -> Loss:
        loss, told = self._judged(network, batch)
        total = loss.sum()
        return Loss(total, total.new_tensor(len(loss)), {name: told[name].sum() for name in self.metrics})

    def shown(self, means: Mapping[str, float]) -> dict[str, float]:
        """Means over all rows as those over the liked, and over the others; without those of a side that has no row.

        `liked` is the share of rows that are; the margin is the difference of two means over different rows.
        """
        shares = {"chosen": means["liked"], "rejected": 1 - means["liked"]}
        out = {}
        for name, mean in means.items():
            share = shares.get(name.rpartition("/")[2], 1.0)
            if share:
                out[name] = mean / share
        if all(shares.values()):
            out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        return out

    @torch.no_grad()
    def evaluate(self, network: Any, batch: Batch) -> Loss:
        """The same of each row [U], and whether it lies on the right side of the reference point."""
        loss, told = self._judged(network, self.prepare(network, batch))
        return Loss(loss, torch.ones_like(loss), told)

    def _judged(self, network: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """[U] losses, and what is told of each row: of the side that it is not of, 0."""
        assert self.point is not None, "a step is surveyed before it is learnt"
        config, liked = self.config, batch.fields["labels"][:, 0] > 0
        logps = sums(batch, token_logprobs(network, batch))
        ratios = logps - batch.fields[REFERENCE]
        loss = losses.kto(ratios, liked, self.point, config.beta, config.desirable_weight, config.undesirable_weight)
        reward, logps = config.beta * ratios.detach(), logps.detach()
        side = losses.ahead_of(ratios.detach(), self.point)
        return loss, {
            "rewards/chosen": reward * liked, "rewards/rejected": reward * ~liked, "logps/chosen": logps * liked,
            "logps/rejected": logps * ~liked, "kl": self.point.expand(len(loss)), "liked": liked.float(),
            "rewards/accuracies": torch.where(liked, side, 1 - side),
        }  # fmt: skip
