"""Steps 5 to 7: the optimiser, its schedule, weight decay and clipping."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import Settings


class AdamW(Settings):
    """AdamW (arXiv:1711.05101) with clipping of the whole gradient by its norm."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """Never applied to norms and biases, that is, to what has less than two dimensions."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """0 does not clip; the norm is logged all the same."""


class Schedule(Settings):
    """The learning rate over the steps of a run."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float | int = Field(0, ge=0)
    """A share of the steps below 1, or a number of steps."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Where linear and cosine end, as a share of the peak."""
