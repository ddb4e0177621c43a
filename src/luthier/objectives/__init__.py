"""Step 4, objectives: what is made small; a class for each answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .classification import Classification, TokenClassification
from .next_token import NextToken
from .objective import Learning

__all__ = ["Classification", "Learning", "NextToken", "Objective", "TokenClassification"]

Objective = Annotated[NextToken | Classification | TokenClassification, Field(discriminator="kind")]
