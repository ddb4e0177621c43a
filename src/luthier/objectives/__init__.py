"""Step 4, objectives: what is made small; a class for each answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .distillation import Distillation
from .next_token import NextToken
from .objective import Learning
from .preference import CPO, DPO, KTO, ORPO, SimPO
from .reward import BradleyTerry

__all__ = [
    "CPO",
    "DPO",
    "KTO",
    "ORPO",
    "BradleyTerry",
    "Distillation",
    "Learning",
    "NextToken",
    "Objective",
    "SimPO",
]

Objective = Annotated[
    NextToken
    | DPO
    | SimPO
    | ORPO
    | CPO
    | KTO
    | BradleyTerry
    | Distillation,
    Field(discriminator="kind"),
]
