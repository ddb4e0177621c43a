"""8-bit integers with a scale for each output (LLM.int8()'s vector-wise weights, arXiv:2208.07339)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear import StoredLinear, pieces


class Int8Linear(StoredLinear):
    """W[o, i] = codes[o, i] * absmax[o] / 127, with codes from -127 to 127, ties rounded to even."""

    kind = "int8"

    @classmethod
    def encode(cls, weight: Tensor, config: Any) -> tuple[dict[str, Tensor], tuple]:
        codes = torch.empty_like(weight, dtype=torch.int8)
        absmax = torch.empty(len(weight), device=weight.device)
        for begin, rows in pieces(weight, 1):
            largest = rows.abs().amax(1)
            factor = torch.where(largest > 0, 127 / largest, 0)
            codes[begin : begin + len(rows)] = (rows * factor[:, None]).round().to(torch.int8)
            absmax[begin : begin + len(rows)] = largest
        return {"codes": codes, "absmax": absmax}, ()

    @staticmethod
    def decode(constants: tuple, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        codes, absmax = parts
        return (codes.float() * (absmax / 127)[:, None]).to(dtype)

    @staticmethod
    def again(constants: tuple, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        codes, absmax = parts
        return (codes.t().float() * (absmax / 127)).to(dtype).t()
