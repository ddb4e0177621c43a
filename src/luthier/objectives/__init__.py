"""Step 4, objectives: what is made small; a class for each answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .distillation import Distillation
from .next_token import NextToken
from .objective import Learning

__all__ = ["Distillation", "Learning", "NextToken", "Objective"]

Objective = Annotated[NextToken | Distillation, Field(discriminator="kind")]
