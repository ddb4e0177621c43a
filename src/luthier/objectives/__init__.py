"""Step 4, objectives: what is made small; a class for each answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .grpo import GRPO
from .next_token import NextToken
from .objective import Learning
from .rolling_out import RollingOut

__all__ = ["GRPO", "Learning", "NextToken", "Objective", "RollingOut"]

Objective = Annotated[NextToken | GRPO, Field(discriminator="kind")]
