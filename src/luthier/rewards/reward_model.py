"""Reward: the score of a reward model, a saved sequence classifier or a run of the method `reward`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .reward import NOTHING, Given, Reward, Rewarding


class RewardModel(Rewarding):
    """What a network with one output says of the whole conversation, the answer included."""

    kind: Literal["reward_model"] = "reward_model"
    model: str = Field(min_length=1)
    """Folder or name of a sequence classifier with one label, or the folder of a run."""
    batch_size: int = Field(16, ge=1)
    """Conversations scored at once."""

    def build(self, given: Given = NOTHING) -> Reward:
        assert given.load_model is not None, "whoever makes rewards passes in how models are loaded"
        return given.load_model(self)
