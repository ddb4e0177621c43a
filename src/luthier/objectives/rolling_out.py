"""What the settings of every objective say that learns from the network's own answers: how these are drawn."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ..rewards import Rewards
from .objective import Learning


class RollingOut(Learning):
    """Settings of an objective on rollouts. Its module has two methods beside those of every objective:

    `score(network, batch) -> {name: [N, ...]}` says of each learnt token of a batch of answers, without gradients,
    what `forward` will want to know of the network as it was: log-probabilities, values.
    `credit(samples) -> metrics` is given all answers of a batch of rollouts (`sampled.Sampled`, in groups, rewarded and
    scored; on several ranks all of everybody's), adds to their `fields` what each token is worth, may clear `learnt`,
    and returns what the log is to say of them; the module's `credits` are the names of the fields that it adds, [n].
    Where the module has them: `idle(group) -> bool` and `resamples`, groups that are drawn again, up to so many times;
    `enough(metrics) -> str | None`, why after this step the rest of the passes over its rollouts is left out, if it is;
    `share`, of the prompts that the network answers, where the others keep the answers of their rows.
    """

    rows: ClassVar[str] = "prompts"
    section: ClassVar[str] = "objective"
    """Where these settings stand."""
    rewards: Rewards = []
    """What answers are worth: a list of rewards, each with its `weight`; or the kind of one that needs no settings."""
    num_generations: int = Field(1, ge=1)
    """Answers to each prompt."""
    max_completion_length: int = Field(256, ge=1)
    """Longest answer in tokens; longer ones are cut. With the prompt it must fit data.max_length."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Of the distribution that answers are drawn from; it is the one that is learnt."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the smallest set of tokens that holds this probability."""
    top_k: int = Field(0, ge=0)
    """Draw from so many of the likeliest tokens; 0 for all."""
    num_mini_batches: int = Field(1, ge=1)
    """Optimiser steps in each pass over a batch of rollouts, which has batch.examples answers for each of them."""
    decode_batch_size: int = Field(64, ge=1)
    """Answers that are drawn at once; changes memory and speed only."""
    rollout_merged: bool = False
    """Merge adapters into copies of their layers while answers are drawn: quicker, for the memory of the copies."""

    @property
    def rolls_out(self) -> bool:
        return True

    @property
    def sampling(self) -> Any:
        return self

    @property
    def rewarded(self) -> Rewards | None:
        return self.rewards

    @property
    def passes(self) -> int:
        """Times that each batch of rollouts is learnt."""
        return 1
