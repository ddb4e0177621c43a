"""A low-rank update beside a frozen layer, plain or quantised or transposed (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..surgery import Adapter, device_of, linear_shape


class LowRank:
    """base(x) + scaling * B A dropout(x); A and B are kept in float32 and computed in the dtype of x."""

    mergeable = True

    def __init__(self, r: int, scaling: float, dropout: float = 0.0):
        self.r, self.scaling, self.dropout = r, scaling, dropout

    def start(self, layer: Any) -> None:
        inputs, outputs = linear_shape(layer.base)  # type: ignore[misc]
        device = device_of(layer.base)
        layer.lora_A = nn.Parameter(torch.empty(self.r, inputs, device=device))
        layer.lora_B = nn.Parameter(torch.zeros(outputs, self.r, device=device))
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))

    def forward(self, layer: Any, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = layer.base(x)
        if self.dropout and layer.training:
            x = F.dropout(x, self.dropout)
        down, up, scaling = layer.lora_A.to(x.dtype), layer.lora_B.to(x.dtype), self.scaling * layer.share
        if torch.compiler.is_compiling():  # a product that is added later fuses with what comes next
            return y + F.linear(F.linear(x, down) * scaling, up)
        return _Update.apply(y, x, down, up, scaling)

    def merge(self, layer: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"weight": tensors["weight"] + self.delta(layer)}

    def delta(self, layer: Any) -> Tensor:
        """What is added to the weight, [out, in]."""
        return self.scaling * layer.share * (layer.lora_B @ layer.lora_A)

    def saved(self, layer: Any) -> dict[str, Tensor]:
        return {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}


class _Update(torch.autograd.Function):
    """y += scaling * up(down(x)), with each product in the order of operands that skinny matrices are fastest in."""

    @staticmethod
    def forward(ctx, y, x, down, up, scaling):  # [..., out], [..., in], [r, in], [out, r]
        x = x.flatten(0, -2)
        z = x @ down.t()
        ctx.save_for_backward(x, z, down, up)
        ctx.scaling = scaling
        y.flatten(0, -2).addmm_(z, up.t(), alpha=scaling)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        x, z, down, up = ctx.saved_tensors
        flat = upstream.flatten(0, -2)
        dz = flat @ (up * ctx.scaling)
        dx = (dz @ down).view(*upstream.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        return upstream, dx, dz.t() @ x, ((z.t() * ctx.scaling) @ flat).t(), None
