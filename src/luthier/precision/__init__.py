"""Step 4, precision: in which numbers the weights are kept and computed; a class for each answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn


class Stored(Settings):
    """What all answers have: the numbers that are multiplied, whatever the weights are kept in."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU that has it and float32 elsewhere."""

    def resolve(self, device: torch.device) -> torch.dtype:
        from . import as_loaded

        return as_loaded.resolve(self, device)

    def apply(self, model: nn.Module) -> None:
        """What is done to the network after it is known what moves."""


class AsLoaded(Stored):
    """Plain floating point: 16 bits where the hardware computes in them, else 32."""

    kind: Literal["as_loaded"] = "as_loaded"


Precision = AsLoaded
