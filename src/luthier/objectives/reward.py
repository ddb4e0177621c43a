"""Reward model: the settings of the pairwise loss of Bradley and Terry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from .objective import Learning

if TYPE_CHECKING:
    from torch import nn


class BradleyTerry(Learning):
    """One score of a whole conversation, larger for the better one of each pair (arXiv:1706.03741).

    Where rows have a `margin`, the better one is to score more by it (arXiv:2307.09288, equation 2).
    """

    rows: ClassVar[str] = "whole_pairs"
    ends_in: ClassVar[str] = "text"

    kind: Literal["reward"] = "reward"
    center_rewards_coefficient: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Weight of the square of a pair's sum of scores beside, which keeps their mean near 0 (arXiv:2312.09244)."""

    @property
    def scores(self) -> tuple[str, ...]:
        return ("reward",)

    @property
    def problem(self) -> str | None:
        return "regression"

    def build(self, network: Any = None) -> nn.Module:
        from . import bradley_terry

        return bradley_terry.RewardObjective(self)
