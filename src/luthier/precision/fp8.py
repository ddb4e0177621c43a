"""8-bit floating point (float8_e4m3fn, arXiv:2209.05433) with a scale for each output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear import StoredLinear, pieces

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


class FP8Linear(StoredLinear):
    """W[o, i] = codes[o, i] * scale[o]: the largest absolute weight of a row becomes 448."""

    kind = "fp8"

    @classmethod
    def encode(cls, weight: Tensor, config: Any) -> tuple[dict[str, Tensor], tuple]:
        codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        scale = torch.empty(len(weight), device=weight.device)
        for begin, rows in pieces(weight, 1):
            each = rows.abs().amax(1) / LARGEST
            each = torch.where(each > 0, each, 1.0)
            codes[begin : begin + len(rows)] = (rows / each[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            scale[begin : begin + len(rows)] = each
        return {"codes": codes, "scale": scale}, ()

    @staticmethod
    def decode(constants: tuple, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        codes, scale = parts
        return (codes.float() * scale[:, None]).to(dtype)

    @staticmethod
    def again(constants: tuple, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        codes, scale = parts
        return (codes.t().float() * scale).to(dtype).t()
