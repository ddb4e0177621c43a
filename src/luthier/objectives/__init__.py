"""Step 4, objectives: what is made small; a class for each answer."""

from __future__ import annotations

from .next_token import NextToken
from .objective import Learning

__all__ = ["Learning", "NextToken", "Objective"]

Objective = NextToken
