"""Step 4, precision: in which numbers the weights are kept and computed; a class for each answer."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ..settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..surgery import Storage


class Stored(Settings):
    """What all answers have: the numbers that are multiplied, whatever the weights are kept in."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU that has it and float32 elsewhere."""

    def resolve(self, device: torch.device) -> torch.dtype:
        from . import as_loaded

        return as_loaded.resolve(self, device)

    def storage(self, dtype: torch.dtype) -> Storage | None:
        """How frozen layers that compute in `dtype` are kept in fewer bits; None where they are not."""
        return None

    def lacking(self) -> str | None:
        """What has to be installed first, if anything."""
        return None

    def apply(self, model: nn.Module) -> None:
        """What is done to the network after it is known what moves."""

    def begin(self, model: nn.Module, step: int) -> None:
        """What changes in it after `step` optimiser steps."""


class AsLoaded(Stored):
    """Plain floating point: 16 bits where the hardware computes in them, else 32."""

    kind: Literal["as_loaded"] = "as_loaded"


class Reduced(Stored):
    """The linear layers inside the network's blocks frozen, in fewer bits; head, embeddings and norms stay as they are.

    Weights go to their bits while they are read, so that the network never exists in 16 bits.
    """


class NF4(Reduced):
    """4-bit NormalFloat (arXiv:2305.14314), bit for bit as bitsandbytes keeps it."""

    kind: Literal["nf4"] = "nf4"
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Neighbouring weights that share a scale, the largest absolute value among them."""
    double_quant: bool = True
    """Keep the scales in 8 bits, too (bitsandbytes' `bnb_4bit_use_double_quant`): 4.13 bits a weight instead of 4.5."""

    def storage(self, dtype: torch.dtype) -> Storage:
        from .linear import InLayers
        from .nf4 import NF4Linear

        return InLayers(NF4Linear, self, dtype)

    def lacking(self) -> str | None:
        return None if find_spec("bitsandbytes") else "pip install 'luthier[quant]' (4-bit weights are bitsandbytes')"


class Int8(Reduced):
    """8-bit integers, a scale for each output: the largest absolute weight of a row becomes 127 (arXiv:2208.07339)."""

    kind: Literal["int8"] = "int8"

    def storage(self, dtype: torch.dtype) -> Storage:
        from .int8 import Int8Linear
        from .linear import InLayers

        return InLayers(Int8Linear, self, dtype)


class FP8(Reduced):
    """8-bit floating point, float8_e4m3fn (arXiv:2209.05433), a scale for each output."""

    kind: Literal["fp8"] = "fp8"

    def storage(self, dtype: torch.dtype) -> Storage:
        from .fp8 import FP8Linear
        from .linear import InLayers

        return InLayers(FP8Linear, self, dtype)


ROUNDING = "quantisation-aware"  # what the layers of QAT are named among adapters
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


Precision = Annotated[AsLoaded | NF4 | Int8 | FP8 | QAT, Field(discriminator="kind")]
