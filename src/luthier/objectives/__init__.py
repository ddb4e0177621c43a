"""Step 4, objectives: what is made small; a class for each answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..settings import Settings

if TYPE_CHECKING:
    from torch import nn


class NextToken(Settings):
    """Cross-entropy of the next token, on the tokens that are learnt."""

    kind: Literal["next_token"] = "next_token"
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """This share of the target is spread evenly over the vocabulary (arXiv:1512.00567); in training only."""

    def build(self) -> nn.Module:
        from . import next_token

        return next_token.NextTokenObjective(self)


Objective = NextToken
