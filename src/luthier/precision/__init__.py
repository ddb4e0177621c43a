"""Step 4, precision: in which numbers the weights are kept and computed; a class for each answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

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

    def begin(self, model: nn.Module, step: int) -> None:
        """What changes in it after `step` optimiser steps."""


class AsLoaded(Stored):
    """Plain floating point: 16 bits where the hardware computes in them, else 32."""

    kind: Literal["as_loaded"] = "as_loaded"


WHOLE_ROW = -1
GROUP_SIZES = {  # where none is given: weights along a row of inputs that share a scale
    "int8-dynamic-act-int4-weight": 32, "int8-dynamic-act-int8-weight": WHOLE_ROW, "int4-weight-only": 32,
    "fp8": WHOLE_ROW,
}  # fmt: skip


class QAT(Stored):
    """Quantisation-aware training (arXiv:1712.05877): every linear layer of the blocks computes with rounded numbers.

    What is trained stays in floating point; `luthier export --as quantised` rounds it for good.
    """

    kind: Literal["qat"] = "qat"
    scheme: Literal[
        "int8-dynamic-act-int4-weight", "int8-dynamic-act-int8-weight", "int4-weight-only", "fp8"
    ] = "int8-dynamic-act-int4-weight"
    """What weights become, and activations beside them: symmetric integers or float8 (e4m3) with a scale for each
    group, and int8 or float8 with a scale for each token."""
    group_size: int = 32
    """Weights in a row of inputs that share a scale, or -1 for a whole row: by default 32 of 4-bit weights, -1 of
    8-bit ones. It must divide the inputs of every layer."""
    fake_quant_after_n_steps: int = Field(0, ge=0)
    """Optimiser steps in full precision before training rounds; evaluations after the first always do."""

    @model_validator(mode="before")
    @classmethod
    def _with_group_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and "group_size" not in values:
            scheme = values.get("scheme", cls.model_fields["scheme"].default)
            if isinstance(scheme, str) and scheme in GROUP_SIZES:
                return values | {"group_size": GROUP_SIZES[scheme]}
        return values

    def apply(self, model: nn.Module) -> None:
        from . import qat

        qat.apply(self, model)

    def begin(self, model: nn.Module, step: int) -> None:
        from . import qat

        if self.fake_quant_after_n_steps:
            qat.begin(model, step)


Precision = Annotated[AsLoaded | QAT, Field(discriminator="kind")]
