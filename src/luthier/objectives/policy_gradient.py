"""GRPO and its kin: clipped policy gradients on rollouts, with what holds them near the reference.

GRPO arXiv:2402.03300, PPO's clipped ratio arXiv:1707.06347, Dr. GRPO arXiv:2503.20783, DAPO arXiv:2503.14476, GSPO
arXiv:2507.18071; the estimators of the divergence are those of http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch, Loss
from ..logprobs import logprob_of, rowwise
from ..sampled import Sampled, grouped
from . import group_advantages
from .grpo import GRPO

# ---------------------------------------------------------------------------- of tokens


def entropy_of(logits: Tensor) -> Tensor:
    """[n] entropies in nats of the distributions that logits [n, V] stand for."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def with_entropy(temperature: float, gradient: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of rows of logits: [n, 2] log-probability of the target and entropy, both at the temperature."""

    def function(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits / temperature
        if gradient:
            return torch.stack([logprob_of(logits, targets), entropy_of(logits)], 1)
        return torch.stack([logprob_of(logits, targets), entropy_of(logits.detach())], 1)

    return function


def at_temperature(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, targets: logprob_of(logits / temperature, targets)


def divergence(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """[N] estimates, from a sample of the policy, of KL(policy || reference): k1, k2 or k3."""
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return log_ratio.expm1() - log_ratio


def means(values: Tensor, owners: Tensor, documents: int) -> Tensor:
    """[D] of values [N] that belong to documents."""
    return sums(values, owners, documents) / sums(torch.ones_like(values), owners, documents)


def sums(values: Tensor, owners: Tensor, documents: int) -> Tensor:
    return values.new_zeros(documents).index_add(0, owners, values)


def clipped_loss(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float | None = None
) -> tuple[Tensor, Tensor]:
    """[N] -min(r A, clip(r, 1 - low, 1 + high) A) for r = exp(log_ratio), and where the clipping took the gradient.

    With `delta`, r itself counts no further than that, which bounds the loss of a negative advantage.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    free = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.min(free * advantages, bounded * advantages)
    clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return loss, clipped


def correction(log_ratio: np.ndarray, how: str, cap: float) -> np.ndarray:
    """[n] weights of the tokens of one answer, from log p(in training) - log p(as drawn): truncated importance sampling.

    https://fengyao.notion.site/off-policy-rl
    """
    level, _, kind = how.partition("_")
    log_ratio = log_ratio.astype(np.float64)
    ratio = np.exp(log_ratio if level == "token" else np.full_like(log_ratio, log_ratio.sum()))
    kept = np.minimum(ratio, cap) if kind == "truncate" else np.where(ratio <= cap, ratio, 0.0)
    return kept.astype(np.float32)


# ---------------------------------------------------------------------------- the objective


class GRPOObjective(nn.Module):
    reference: Callable[[], AbstractContextManager[Any]]

    def __init__(self, config: GRPO):
        super().__init__()
        self.config = config
        self.metrics: tuple[str, ...] = ("entropy", "clip_ratio", *(["kl"] if config.compares else []))
        self.credits = ("advantages", *(["correction"] if config.rollout_correction != "none" else []))
        self.resamples = config.max_resamples

    # ------------------------------------------------------------------ of a round of rollouts
    def score(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """Log-probabilities [N] of the answers' tokens, of the network as it is and as it was at the start."""
        found = {"old_logprobs": self._logprobs(network, batch)}
        if self.config.compares:
            with self.reference() as reference:
                found["reference_logprobs"] = self._logprobs(reference, batch)
        return found

    def _logprobs(self, network: Any, batch: Batch) -> Tensor:
        hidden, targets, _ = network.predictions(batch, network.hidden(batch))
        return rowwise(hidden, network.head, at_temperature(self.config.temperature), targets)

    def credit(self, samples: Sequence[Sampled]) -> dict[str, float]:
        """Advantages of all answers, and weights that make up for how they were drawn."""
        config, groups = self.config, grouped(samples)
        rewards = np.array([[self._worth(one) for one in group] for group in groups], np.float64)
        made = group_advantages.advantages(rewards, config.baseline, config.scale_rewards)
        apart = []
        for one, advantage in zip((one for group in groups for one in group), made.ravel()):
            log_ratio = one.fields["old_logprobs"] - one.logprobs
            apart.append(np.abs(log_ratio))
            one.fields["advantages"] = np.full(len(one), advantage, np.float32)
            if config.rollout_correction != "none":
                one.fields["correction"] = correction(
                    log_ratio, config.rollout_correction, config.rollout_correction_cap
                )
            one.learnt = one.ended or not config.mask_truncated_completions
        away = np.concatenate(apart)
        return {"mismatch_mean": float(away.mean()), "mismatch_max": float(away.max())}

    def _worth(self, one: Sampled) -> float:
        if self.config.kl_in == "loss":
            return one.reward
        away = one.fields["old_logprobs"].astype(np.float64) - one.fields["reference_logprobs"]
        return one.reward - self.config.beta * float(away.sum())

    def idle(self, group: Sequence[Sampled]) -> bool:
        """Whether nothing can be learnt from it."""
        return bool(group_advantages.equal(np.array([[one.reward for one in group]]))[0])

    # ------------------------------------------------------------------ of a batch
    def prepare(self, network: Any, batch: Batch) -> Batch:
        return batch

    def forward(self, network: Any, batch: Batch) -> Loss:
        config = self.config
        hidden, targets, _ = network.predictions(batch, network.hidden(batch))
        of_tokens = with_entropy(config.temperature, bool(config.entropy_coef))
        logprobs, entropy = rowwise(hidden, network.head, of_tokens, targets).unbind(1)
        given = {name: values[batch.trained] for name, values in batch.token_fields.items()}
        owners, documents = batch.owners(), batch.documents
        log_ratio = logprobs - given["old_logprobs"]
        if config.importance_sampling_level == "sequence":
            log_ratio = means(log_ratio, owners, documents)[owners]
        loss, clipped = clipped_loss(log_ratio, given["advantages"], config.epsilon, config.high, config.delta)
        if "correction" in given:
            loss = loss * given["correction"]
        told = {"entropy": entropy, "clip_ratio": clipped.float()}
        if config.compares:
            told["kl"] = divergence(logprobs, given["reference_logprobs"], config.kl_estimator)
            if config.beta and config.kl_in == "loss":
                loss = loss + config.beta * told["kl"]
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy
        return self._summed(loss, told, owners, documents)

    def _summed(self, loss: Tensor, told: dict[str, Tensor], owners: Tensor, documents: int) -> Loss:
        """The sum and what it is divided by, which depend on the answers alone and not on who shares a micro-batch."""
        kind = self.config.loss_type
        if kind in ("bnpo", "dapo"):
            total, count = loss.sum(), loss.new_tensor(len(loss))
            return Loss(total, count, {name: values.detach().sum() for name, values in told.items()})
        count = loss.new_tensor(documents)
        if kind == "grpo":
            total = means(loss, owners, documents).sum()
        else:
            total = loss.sum() / self.config.max_completion_length
        return Loss(total, count, {n: means(v.detach(), owners, documents).sum() for n, v in told.items()})
