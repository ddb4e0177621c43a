"""Pairs of answers: one objective for DPO, SimPO, ORPO and CPO, which differ in a function of log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Batch, Loss
from . import preference_losses as losses
from .preference import CPO, DPO, ORPO, Paired, Referring, SimPO
from .sequences import REFERENCE, counts, reference_of, sums, token_logprobs


class Sides(NamedTuple):
    """A number for the better answer of each pair [U], and one for the worse [U]."""

    chosen: Tensor
    rejected: Tensor

    def over(self, other: Sides) -> Sides:
        return Sides(self.chosen / other.chosen, self.rejected / other.rejected)

    def less(self, other: Sides) -> Sides:
        return Sides(self.chosen - other.chosen, self.rejected - other.rejected)

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


class Judged(NamedTuple):
    loss: Tensor  # [U]
    rewards: Sides  # what the policy gives the answers, as the method has it


def judged(config: Paired, logps: Sides, tokens: Sides, reference: Sides | None) -> Judged:
    """The loss of each pair, of sums of log-probabilities over so many tokens."""
    means = logps.over(tokens)
    if isinstance(config, DPO):
        assert reference is not None
        ratios = logps.less(reference)
        compared = ratios.over(tokens) if config.loss_type == "ipo" else ratios
        loss = losses.LOSSES[config.loss_type](compared.margin, config.beta, config.label_smoothing)
        return _judged(loss, ratios, config.beta, means, config.rpo_alpha or 0.0)
    if isinstance(config, CPO):
        compared = means if config.loss_type == "ipo" else logps
        loss = losses.LOSSES[config.loss_type](compared.margin, config.beta, config.label_smoothing)
        return _judged(loss, compared, config.beta, means, config.cpo_alpha)
    if isinstance(config, SimPO):
        margin = means.margin - config.simpo_gamma / config.beta
        loss = losses.sigmoid(margin, config.beta, config.label_smoothing)
        return _judged(loss, means, config.beta, means, config.cpo_alpha)
    assert isinstance(config, ORPO)
    loss = config.beta * losses.odds_ratio(*means)
    return _judged(loss, means, config.beta, means, 1.0)


def _judged(loss: Tensor, compared: Sides, beta: float, means: Sides, own: float) -> Judged:
    """With `own` times the loss of the better answer itself, its mean over tokens."""
    rewards = Sides(beta * compared.chosen.detach(), beta * compared.rejected.detach())
    return Judged(loss - own * means.chosen if own else loss, rewards)


class PairObjective(nn.Module):
    """Rows of two documents, the better answer first; what is counted is pairs.

    Rewards that are equal, as at the reference, count one half in `rewards/accuracies`.
    """

    metrics: tuple[str, ...] = (
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    )  # fmt: skip

    def __init__(self, config: Paired):
        super().__init__()
        self.config = config
        self.reference: Any = None  # () -> context of the network as it was at the start; given by assemble

    def ahead(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """[N] log-probabilities of what is learnt, by the network as it was at the start."""
        return {REFERENCE: token_logprobs(network, batch)}

    def prepare(self, network: Any, batch: Batch) -> Batch:
        if not isinstance(self.config, Referring):
            return batch
        values = reference_of(self, batch)
        return replace(batch, fields=batch.fields | {REFERENCE: _paired(sums(batch, values))})

    def forward(self, network: Any, batch: Batch) -> Loss:
        logps, _, found = self._judged(network, batch)
        total = found.loss.sum()
        told = self._told(logps, found.rewards)
        return Loss(total, total.new_tensor(len(found.loss)), {name: told[name].sum() for name in self.metrics})

    @torch.no_grad()
    def evaluate(self, network: Any, batch: Batch) -> Loss:
        """Of each pair [U] the same, and whether the better answer is the likelier one, in all and for each token."""
        logps, tokens, found = self._judged(network, self.prepare(network, batch))
        means = logps.over(tokens)
        told = self._told(logps, found.rewards) | {
            "logps/accuracies": losses.ahead_of(*logps), "logps/accuracies_norm": losses.ahead_of(*means),
        }  # fmt: skip
        return Loss(found.loss, torch.ones_like(found.loss), told)

    def _judged(self, network: Any, batch: Batch) -> tuple[Sides, Sides, Judged]:
        logps = Sides(*_paired(sums(batch, token_logprobs(network, batch))).unbind(1))
        tokens = Sides(*_paired(counts(batch)).unbind(1))
        known = batch.fields.get(REFERENCE)
        return logps, tokens, judged(self.config, logps, tokens, None if known is None else Sides(*known.unbind(1)))

    @staticmethod
    def _told(logps: Sides, rewards: Sides) -> dict[str, Tensor]:
        """[U] each, under TRL's names."""
        return {
            "rewards/chosen": rewards.chosen, "rewards/rejected": rewards.rejected, "rewards/margins": rewards.margin,
            "rewards/accuracies": losses.ahead_of(*rewards), "logps/chosen": logps.chosen.detach(),
            "logps/rejected": logps.rejected.detach(),
        }  # fmt: skip


def _paired(values: Tensor) -> Tensor:
    """[D] as [U, 2]."""
    return values.view(-1, 2)
