"""Step 4, objectives: what is made small; a class for each answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .classification import Classification, TokenClassification
from .distillation import Distillation
from .grpo import GRPO
from .next_token import NextToken
from .objective import Learning
from .ppo import PPO
from .preference import CPO, DPO, KTO, ORPO, SimPO
from .reward import BradleyTerry
from .rolling_out import RollingOut

__all__ = [
    "CPO",
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "PPO",
    "BradleyTerry",
    "Classification",
    "Distillation",
    "Learning",
    "NextToken",
    "Objective",
    "RollingOut",
    "SimPO",
    "TokenClassification",
]

Objective = Annotated[
    NextToken
    | Classification
    | TokenClassification
    | DPO
    | SimPO
    | ORPO
    | CPO
    | KTO
    | BradleyTerry
    | Distillation
    | GRPO
    | PPO,
    Field(discriminator="kind"),
]
