"""GRPO and its kin (RLOO, Dr. GRPO, DAPO, GSPO): the settings, of which each of the names is a choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from .rolling_out import RollingOut

if TYPE_CHECKING:
    from torch import nn


class GRPO(RollingOut):
    """Policy gradient with the other answers to the same prompt as the baseline (GRPO, arXiv:2402.03300)."""

    kind: Literal["grpo"] = "grpo"
    num_generations: int = Field(8, ge=1)
    """Answers to each prompt: the group that they are compared in."""
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean"
    """What a reward is compared with: the mean of its group, or of the others in it (RLOO, arXiv:2402.14740)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the rewards of the group, of the whole round, or not at all."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """What the tokens' losses are divided by: each answer's length and the number of answers (`grpo`); the number of
    answers times max_completion_length (`dr_grpo`, arXiv:2503.20783); the number of tokens (`dapo`, arXiv:2503.14476,
    and `bnpo`, which here is the same, as micro-batches change nothing)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whose ratio of new to old probability is clipped: each token's, or the answer's geometric mean (GSPO,
    arXiv:2507.18071)."""
    epsilon: float = Field(0.2, ge=0, allow_inf_nan=False)
    """The ratio counts no further than 1 - epsilon below."""
    epsilon_high: float | None = Field(None, ge=0, allow_inf_nan=False)
    """And 1 + epsilon_high above; epsilon without it (DAPO's clip-higher)."""
    delta: float | None = Field(None, gt=1, allow_inf_nan=False)
    """Upper bound of the ratio where the advantage is negative, too (two-sided clipping, arXiv:2505.07291)."""
    num_iterations: int = Field(1, ge=1)
    """Passes over each batch of rollouts."""
    beta: float = Field(0.04, ge=0, allow_inf_nan=False)
    """Weight of the divergence from the network at the start."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of log r, the reference's log-probability less the policy's: -log r, (log r)^2 / 2, r - 1 - log r."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the divergence counts: a term of each token's loss, or taken off the answer's reward, summed over tokens."""
    report_kl: bool = True
    """Measure the divergence where beta is 0, too; where the weights themselves move, it costs a copy of them."""
    entropy_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the entropy of the next token's distribution, which is made large."""
    mask_truncated_completions: bool = False
    """Learn nothing from answers that were cut; they still count in the baseline."""
    max_resamples: int = Field(0, ge=0)
    """Replace groups of equal rewards, which teach nothing, by groups of other prompts, up to so many times a round
    (DAPO's dynamic sampling)."""
    rollout_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate"  # fmt: skip
    """Weigh each token (or answer) by its probability in training over that with which it was drawn: these differ where
    top_p or top_k cut, and by rounding. A weight above the cap is the cap, or 0."""
    rollout_correction_cap: float = Field(2.0, ge=1, allow_inf_nan=False)
    """The largest weight."""

    @property
    def compares(self) -> bool:
        return self.beta > 0 or self.report_kl

    @property
    def passes(self) -> int:
        return self.num_iterations

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def problems(self) -> list[str]:
        """What does not go together."""
        found = []
        if self.num_generations < 2:
            found.append(
                f"objective.num_generations={self.num_generations}: an answer is compared with others to the same "
                "prompt, so give at least 2; with one answer a prompt use method=ppo"
            )
        if self.beta and self.kl_estimator == "k1" and self.kl_in == "loss":
            found.append(
                "objective.kl_estimator=k1 as a term of the loss has a gradient of mean zero, so it holds nothing back: "
                "use k2 or k3, or objective.kl_in=reward"
            )
        if self.beta and self.kl_in == "reward" and self.kl_estimator != "k1":
            found.append(
                f"objective.kl_estimator={self.kl_estimator} with objective.kl_in=reward: the policy gradient of a "
                "reward wants the unbiased estimator: use k1"
            )
        if self.kl_in == "reward" and not self.beta:
            found.append("objective.kl_in=reward with objective.beta=0 takes nothing off: give beta, or leave kl_in out")
        if self.delta is not None and self.delta <= 1 + self.high:
            found.append(
                f"objective.delta={self.delta} is not above 1 + epsilon_high={1 + self.high:g}, where the ratio is "
                "clipped already: use a larger one"
            )
        if self.importance_sampling_level == "sequence" and self.loss_type != "grpo":
            found.append(
                f"objective.importance_sampling_level=sequence with objective.loss_type={self.loss_type} would weigh "
                "answers by their lengths: use objective.loss_type=grpo"
            )
        return found

    def build(self, network: Any = None) -> nn.Module:
        from . import policy_gradient

        return policy_gradient.GRPOObjective(self)
