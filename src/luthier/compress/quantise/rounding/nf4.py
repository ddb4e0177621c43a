"""4-bit NormalFloat (https://arxiv.org/abs/2305.14314) by bitsandbytes: blocks of 64, doubly quantised scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....precision.nf4 import library

BLOCK = 64


@dataclass
class Blocks:
    """A layer's weight as bitsandbytes keeps it."""

    codes: Tensor  # [out * in / 2, 1] bytes
    state: Any
    """Its QuantState."""
    bits: int = 4
    group: int = BLOCK

    def weight(self) -> Tensor:
        """[out, in] in float32 of what bitsandbytes multiplies with."""
        return library().dequantize_4bit(self.codes, self.state).float()


def rounded(weight: Tensor, dtype: torch.dtype) -> Blocks:
    """A weight [out, in] that is multiplied in `dtype`."""
    codes, state = library().quantize_4bit(
        weight.to(dtype).contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return Blocks(codes, state)
