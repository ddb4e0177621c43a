"""A low-rank update beside a frozen layer, plain or quantised or transposed (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..surgery import Adapter, dense, device_of, linear_shape
from . import first_values


class LowRank:
    """base(x) + scaling * B A dropout(x); A and B are kept in float32 and computed in the dtype of x.

    With `pissa` the update is scaling * (B A - B0 A0), where A0 and B0 are the first values of A and B. PiSSA takes
    scaling * B0 A0 out of the base's weight once for all; here it is taken out in each product, so that the base stays
    as it is, in any precision, and what is saved is a LoRA of twice the rank beside it.
    """

    mergeable = True
    listed = "target_modules"
    constants: ClassVar[tuple[str, ...]] = ("lora_A_start", "lora_B_start")

    def __init__(self, r: int, scaling: float, dropout: float = 0.0, init: str = "kaiming", zero: str = "lora_B"):
        self.r, self.scaling, self.dropout, self.init, self.zero = r, scaling, dropout, init, zero

    def start(self, layer: Any) -> None:
        inputs, outputs = linear_shape(layer.base)  # type: ignore[misc]
        device = device_of(layer.base)
        layer.lora_A = nn.Parameter(torch.empty(self.r, inputs, device=device))
        layer.lora_B = nn.Parameter(torch.empty(outputs, self.r, device=device))
        for name in self.constants:
            layer.register_buffer(name, None)
        if not self.init.startswith("pissa"):
            first_values.draw(layer.lora_A, layer.lora_B, self.init, self.zero)
            return
        if self.r > min(inputs, outputs):
            raise ModelError(
                f"trainable.r={self.r}: with init_lora_weights={self.init} at most {min(inputs, outputs)} for a layer "
                f"of {inputs} inputs and {outputs} outputs, which has no more principal parts; use a smaller r, or "
                "leave the layer out by exclude_modules"
            )
        if device.type != "meta":
            a, b = first_values.principal(dense(layer.base)["weight"].detach(), self.r, self.scaling, self.init)
            with torch.no_grad():
                layer.lora_A.copy_(a)
                layer.lora_B.copy_(b)
        layer.lora_A_start, layer.lora_B_start = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        """`down` [k, in] and `up` [out, k] with the update scaling * up down; k is r, and 2 r with PiSSA."""
        if layer.lora_A_start is None:
            return layer.lora_A, layer.lora_B
        return torch.cat([layer.lora_A, layer.lora_A_start]), torch.cat([layer.lora_B, -layer.lora_B_start], 1)

    def forward(self, layer: Any, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = layer.base(x)
        if self.dropout and layer.training:
            x = F.dropout(x, self.dropout)
        down, up = (factor.to(x.dtype) for factor in self.factors(layer))
        scaling = self.scaling * layer.share
        if torch.compiler.is_compiling():  # a product that is added later fuses with what comes next
            return y + F.linear(F.linear(x, down) * scaling, up)
        if y._is_view():  # as an adapter beneath may hand it out: nothing can be added into it
            y = y.clone()
        return _Update.apply(y, x, down, up, scaling)

    def merge(self, layer: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"weight": tensors["weight"] + self.delta(layer)}

    def delta(self, layer: Any) -> Tensor:
        """What is added to the weight, [out, in]."""
        down, up = self.factors(layer)
        return self.scaling * layer.share * (up @ down)

    def saved(self, layer: Any) -> dict[str, Tensor]:
        down, up = self.factors(layer)
        return {"lora_A.weight": down, "lora_B.weight": up}


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
