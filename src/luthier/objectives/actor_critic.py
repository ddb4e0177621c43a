"""PPO: clipped losses of a policy and its critic over the network's own answers (arXiv:1707.06347)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import surgery
from ..batch import Batch, Loss
from ..errors import ModelError
from ..logprobs import rowwise
from ..sampled import Sampled
from .gae import explained_variance, gae, sums, token_rewards, whitened
from .kl_control import Coefficient
from .policy_gradient import clipped_loss, divergence, with_entropy
from .ppo import PPO, ValueHead


def value_loss(
    values: Tensor, before: Tensor, returns: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[N] half the larger of the squared errors of V and of V kept within `cliprange` of the value before, and where
    the latter is larger."""
    plain = (values - returns) ** 2
    if cliprange is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (values.clamp(before - cliprange, before + cliprange) - returns) ** 2  # exactly `plain` within the range
    return torch.maximum(plain, clipped) / 2, clipped > plain


class HeadCritic(nn.Module):
    """Values of the policy's own last hidden states."""

    def __init__(self, config: ValueHead, width: int):
        super().__init__()
        self.detach = config.detach
        self.value = nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, batch: Batch, states: Tensor) -> Tensor:
        """[N] of the states [N, H] that predict what is learnt."""
        states = states.detach() if self.detach else states
        return self.value(states.to(self.value.weight.dtype))[:, 0].float()


class ModelCritic(nn.Module):
    """Values by a network of its own: a linear map of its last hidden states, at first 0, or a reward model's score."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        scores = [network.model.get_submodule(place) for place in surgery.heads(network.model)]
        self.value = nn.Linear(network.config.get_text_config().hidden_size, 1).to(network.device)
        nn.init.zeros_(self.value.bias)
        if not scores:
            nn.init.zeros_(self.value.weight)
            head, embeddings = network.model.get_output_embeddings(), network.model.get_input_embeddings()
            if head.weight is not embeddings.weight:  # nothing is learnt of it
                head.requires_grad_(False)
            return
        if [surgery.linear_shape(score) for score in scores] != [(self.value.in_features, 1)]:
            raise ModelError(
                f"objective.critic: {type(network.model).__name__} makes its score by more than one linear layer with "
                "one output, which is no value of each token: use a reward model with one, or a language model"
            )
        with torch.no_grad():
            for name, tensor in surgery.dense(scores[0]).items():  # of one that was trained, as it is now
                getattr(self.value, name).copy_(tensor)
        scores[0].requires_grad_(False)

    def forward(self, batch: Batch, states: Tensor) -> Tensor:
        """[N] at the positions that predict what is learnt; the policy's own states are not looked at."""
        training = self.network.training
        self.network.train(training and torch.is_grad_enabled())
        try:
            hidden = self.network.hidden(batch)[batch.trained]
        finally:
            self.network.train(training)
        return self.value(hidden.to(self.value.weight.dtype))[:, 0].float()


class PPOObjective(nn.Module):
    metrics: tuple[str, ...] = (
        "loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac", "val/clipfrac", "entropy", "ratio",
    )  # fmt: skip
    passing = ("critic",)  # serves training alone
    credits: tuple[str, ...] = ("advantages", "returns")
    reference: Callable[[], AbstractContextManager[Any]]

    def __init__(self, config: PPO, network: Any):
        super().__init__()
        self.config = config
        adaptive = config.adaptive_kl
        self.coefficient = Coefficient(config.kl_coef)
        if adaptive:
            self.coefficient = Coefficient(config.kl_coef, adaptive.target, adaptive.horizon)
        if config.kl_in == "loss":
            self.metrics = (*self.metrics, "loss/kl")
        self.critic: HeadCritic | ModelCritic | None = None
        if isinstance(config.critic, ValueHead):
            self.critic = HeadCritic(config.critic, _width(network))
        self._told = with_entropy(config.temperature, bool(config.entropy_coef))

    def take_critic(self, network: Any) -> None:
        """The critic that is a network of its own, which is loaded only where the objective is trained."""
        self.critic = ModelCritic(network)

    # ------------------------------------------------------------------ what is said of answers before they are learnt
    @torch.no_grad()
    def score(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """Of each learnt token [N]: its log-probability now and at the start, the value of the state before it."""
        states, targets, _ = network.predictions(batch, network.hidden(batch))
        logprobs = rowwise(states, network.head, self._told, targets)[:, 0]
        assert self.critic is not None
        values = self.critic(batch, states)
        with self.reference() as start:
            states, targets, _ = start.predictions(batch, start.hidden(batch))
            reference = rowwise(states, start.head, self._told, targets)[:, 0]
        return {"old_logprobs": logprobs, "reference_logprobs": reference, "values": values}

    @torch.no_grad()
    def credit(self, samples: Sequence[Sampled]) -> Mapping[str, float]:
        """Advantages and returns of every token, from scores, KL and values; the KL's coefficient follows."""
        config, coefficient = self.config, self.coefficient.value
        ends = (0, *np.cumsum([len(s) for s in samples]).tolist())
        known = {name: _joined(samples, name) for name in ("old_logprobs", "reference_logprobs", "values")}
        penalty = config.missing_eos_penalty or 0.0
        scores = torch.tensor([s.reward - penalty * (not s.ended) for s in samples], dtype=torch.float32)
        taken = divergence(known["old_logprobs"], known["reference_logprobs"], config.kl_estimator)
        rewards = token_rewards(scores, taken if config.kl_in == "reward" else None, coefficient, ends)
        earned = float(sums(rewards, ends).mean())
        if config.whiten_rewards:
            rewards = whitened(rewards, keep_mean=True)
        advantages, returns = gae(rewards, known["values"], ends, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whitened(advantages)
        for name, column in (("advantages", advantages), ("returns", returns)):
            for sample, part in zip(samples, np.split(column.numpy(), ends[1:-1])):
                sample.fields[name] = part
        kl = float(sums(divergence(known["old_logprobs"], known["reference_logprobs"], "k1"), ends).mean())
        self.coefficient.observe(kl, len(samples))
        if config.kl_in == "loss":
            coefficient = self.coefficient.value  # of the passes to come
        return {
            "kl": kl, "kl_coef": coefficient, "score": float(scores.mean()), "reward_with_kl": earned,
            "explained_variance": float(explained_variance(known["values"], returns)),
        }  # fmt: skip

    def enough(self, metrics: Mapping[str, float]) -> str | None:
        target, found = self.config.target_kl, metrics["policy/approxkl"]
        if target is None or not found > target:
            return None
        return f"policy/approxkl={found:.3g} is above objective.target_kl={target:g}"

    # ------------------------------------------------------------------ learning
    def prepare(self, network: Any, batch: Batch) -> Batch:
        return batch

    def forward(self, network: Any, batch: Batch) -> Loss:
        config = self.config
        states, targets, _ = network.predictions(batch, network.hidden(batch))
        logprobs, entropy = rowwise(states, network.head, self._told, targets).unbind(1)
        assert self.critic is not None
        values = self.critic(batch, states)
        known = {name: column[batch.trained] for name, column in batch.token_fields.items()}
        log_ratio = logprobs - known["old_logprobs"]
        policy, clipped = clipped_loss(log_ratio, known["advantages"], config.cliprange, config.cliprange)
        value, kept = value_loss(values, known["values"], known["returns"], config.cliprange_value)
        total = policy.sum() + config.vf_coef * value.sum()
        if config.entropy_coef:
            total = total - config.entropy_coef * entropy.sum()
        log_ratio = log_ratio.detach()
        metrics = {
            "loss/policy": policy.detach().sum(), "loss/value": value.detach().sum(),
            "policy/approxkl": (torch.expm1(log_ratio) - log_ratio).sum(), "policy/clipfrac": clipped.sum(),
            "val/clipfrac": kept.sum(), "entropy": entropy.detach().sum(), "ratio": log_ratio.exp().sum(),
        }  # fmt: skip
        if config.kl_in == "loss":
            kl = divergence(logprobs, known["reference_logprobs"], config.kl_estimator).sum()
            total = total + self.coefficient.value * kl
            metrics["loss/kl"] = kl.detach()
        return Loss(total, torch.tensor(float(len(targets)), device=total.device), metrics)

    # ------------------------------------------------------------------ a part of the checkpoint
    def tensors(self) -> dict[str, Tensor]:
        return self.coefficient.tensors()

    def numbers(self) -> dict:
        return self.coefficient.numbers()

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        self.coefficient.restore(tensors, numbers)


def _width(network: Any) -> int:
    """Of the hidden states that the head takes in."""
    shape = surgery.linear_shape(network.model.get_output_embeddings())
    return shape[0] if shape else network.config.get_text_config().hidden_size


def _joined(samples: Sequence[Sampled], name: str) -> Tensor:
    """[N] of all answers end to end."""
    return torch.from_numpy(np.concatenate([s.fields[name] for s in samples]))
