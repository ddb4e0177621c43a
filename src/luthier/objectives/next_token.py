"""Next-token prediction: the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from .objective import Learning

if TYPE_CHECKING:
    from torch import nn


class NextToken(Learning):
    """Cross-entropy of the next token, on the tokens that are learnt."""

    kind: Literal["next_token"] = "next_token"
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """This share of the target is spread evenly over the vocabulary (arXiv:1512.00567); in training only."""

    def build(self, network: Any = None) -> nn.Module:
        from . import cross_entropy

        return cross_entropy.NextTokenObjective(self)
