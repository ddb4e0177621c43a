"""Step 4, objectives: what is made small; a class for each answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..settings import Settings

if TYPE_CHECKING:
    from torch import nn


class NextToken(Settings):
    """Cross-entropy of the next token, on the tokens that are learnt."""

    kind: Literal["next_token"] = "next_token"

    def build(self) -> nn.Module:
        from . import next_token

        return next_token.NextTokenObjective(self)


Objective = NextToken
