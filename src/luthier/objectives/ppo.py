"""Proximal policy optimisation: the settings, those of its critic and of its KL control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..settings import Settings
from .rolling_out import RollingOut

if TYPE_CHECKING:
    from torch import nn


class ValueHead(Settings):
    """The critic is one linear map of the policy's last hidden states; it begins with 0 everywhere."""

    kind: Literal["head"] = "head"
    detach: bool = False
    """Learn the head alone: the value loss then changes nothing of the network, whose answers are judged."""


class AdaptiveKL(Settings):
    """The coefficient follows the KL that is seen (arXiv:1909.08593): after each batch of rollouts it is multiplied by
    1 + clip(KL / target - 1, -0.2, 0.2) x answers / horizon."""

    target: float = Field(6.0, gt=0, allow_inf_nan=False)
    """KL of a whole answer from the reference, in nats."""
    horizon: int = Field(10_000, ge=1)
    """Answers over which the coefficient may change by a factor of 1.2 or so."""


class ValueModel(Settings):
    """The critic is a network of its own, with a linear map of its last hidden states; its tokens are the policy's."""

    kind: Literal["model"] = "model"
    name: str = Field(min_length=1)
    """A hub name or a folder: of a language model, whose values begin with 0 everywhere; or of a reward model, one that
    transformers loads or a run of method=reward, whose score is the first value."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    trainable: dict[str, Any] | None = None
    """What moves in it, as the section `trainable` of a run; that of the policy without it. A run of method=reward
    goes on with what it trained."""
    precision: dict[str, Any] | None = None
    """In which numbers, as the section `precision` of a run; those of the policy without it."""


def _critic(value: Any) -> Any:
    """`critic: head` stands for its kind, `critic: NAME` and `critic: {name: NAME}` for a model's."""
    if isinstance(value, str):
        value = {"kind": "head"} if value == "head" else {"name": value}
    if isinstance(value, Mapping) and "kind" not in value:
        value = {"kind": "model" if "name" in value else "head", **value}
    return value


Critic = Annotated[ValueHead | ValueModel, Field(discriminator="kind")]


class PPO(RollingOut):
    """Clipped policy gradient on the network's own answers, with a critic (arXiv:1707.06347, arXiv:2203.02155)."""

    kind: Literal["ppo"] = "ppo"
    critic: Annotated[Critic, BeforeValidator(_critic, json_schema_input_type=str | Critic)] = ValueHead()  # type: ignore[call-arg]
    """What tells the value of a state: `head`, a layer on the policy; or a model of its own, by its name."""
    num_ppo_epochs: int = Field(4, ge=1)
    """Times that each batch of rollouts is learnt."""
    cliprange: float = Field(0.2, gt=0, lt=1)
    """The probability of a token is followed until it has changed by this share."""
    cliprange_value: float | None = Field(0.2, gt=0, allow_inf_nan=False)
    """Values are followed until they have changed by this much, in units of the reward; null for any change."""
    vf_coef: float = Field(0.1, gt=0, allow_inf_nan=False)
    """Weight of the value loss."""
    entropy_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the entropy of the next token's distribution, which is made larger."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount of a token's reward for the token before it."""
    lam: float = Field(0.95, ge=0, le=1)
    """Of generalised advantages: 0 trusts the critic's next value, 1 the answer's own rewards."""
    whiten_rewards: bool = False
    """Give the rewards of all tokens of a batch of rollouts variance 1; their mean stays."""
    whiten_advantages: bool = True
    """Give the advantages of all tokens of a batch of rollouts mean 0 and variance 1."""
    missing_eos_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Taken from the score of an answer that did not end by itself."""
    kl_coef: float = Field(0.05, ge=0, allow_inf_nan=False)
    """Weight of the KL from the network as it was at the start; the first one where `adaptive_kl` changes it."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of a token's KL from the token alone (joschu.net/blog/kl-approx.html), l being the difference of
    log-probabilities, policy's less reference's: l, l^2 / 2, or exp(-l) - 1 + l."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Take the KL from each token's reward, or add it to the loss."""
    adaptive_kl: AdaptiveKL | None = None
    """Let the coefficient follow the KL that is seen."""
    target_kl: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Leave out the remaining passes over a batch of rollouts once a token's KL between the policy that sampled it and
    the present one is larger."""

    @property
    def compares(self) -> bool:
        """The KL is told without being weighed, too."""
        return True

    @property
    def own_critic(self) -> ValueModel | None:
        return self.critic if isinstance(self.critic, ValueModel) else None

    @property
    def passes(self) -> int:
        return self.num_ppo_epochs

    def problems(self) -> list[str]:
        found = []
        if self.kl_in == "loss" and self.kl_estimator == "k1" and self.kl_coef:
            found.append(
                "objective.kl_estimator=k1 as a term of the loss has a gradient of mean zero, so it holds nothing "
                "back: use k2 or k3, or objective.kl_in=reward"
            )
        if self.adaptive_kl and not self.kl_coef:
            found.append(
                "objective.adaptive_kl multiplies objective.kl_coef=0, which stays 0: give a first value, such as 0.05"
            )
        if self.target_kl is not None and self.num_ppo_epochs == 1:
            found.append(
                f"objective.target_kl={self.target_kl:g} leaves out further passes over a batch of rollouts, and "
                "objective.num_ppo_epochs=1 makes none: use 2 or more, or leave target_kl out"
            )
        return found

    def build(self, network: Any) -> nn.Module:
        from . import actor_critic

        return actor_critic.PPOObjective(self, network)
