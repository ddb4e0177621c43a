"""LoRA (arXiv:2106.09685): a low-rank update beside frozen linear layers, plain or quantised or transposed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..settings import nearest
from ..surgery import Adapter, blocks, freeze, linear_shape, matches, swap, transposed
from . import LoRA
from .selection import ROLES


class LoRALinear(Adapter):
    """base(x) + scaling * B A dropout(x); A and B are kept in float32 and computed in the dtype of x."""

    def __init__(self, base: Any, config: LoRA):
        super().__init__()
        inputs, outputs = linear_shape(base)  # type: ignore[misc]
        device = base.weight.device
        self.base = base
        self.scaling = config.scaling
        self.dropout = config.lora_dropout
        self.lora_A = nn.Parameter(torch.empty(config.r, inputs, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, config.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = self.base(x)
        if not self.enabled:
            return y
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        down, up = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if torch.compiler.is_compiling():  # a product that is added later fuses with what comes next
            return y + F.linear(F.linear(x, down) * self.scaling, up)
        return _Update.apply(y, x, down, up, self.scaling)

    def delta(self) -> Tensor:
        update = self.scaling * (self.lora_B.detach() @ self.lora_A.detach())
        return update.t() if transposed(self.base) else update


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


def targets(config: LoRA, model: nn.Module) -> list[str]:
    """The names of the linear layers to adapt, in the model's order."""
    linear = [name for name, module in model.named_modules() if linear_shape(module)]
    prefix, _ = blocks(model)
    inside = [name for name in linear if name.startswith(prefix + ".")]
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    chosen: set[str] = set()
    for pattern in wanted:
        if pattern == "all-linear":
            found = set(inside)
        elif pattern in ROLES:
            found = {n for n in inside if any(role in n.rpartition(".")[0].lower() for role in ROLES[pattern])}
        else:
            found = {n for n in linear if matches(n, pattern)}
        if not found:
            meant = nearest(pattern, {n.rpartition(".")[2] for n in linear} | {"all-linear", *ROLES})
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise ModelError(
                f"trainable.target_modules: {pattern!r} matches no linear layer of the model{hint} "
                f"(it has {', '.join(sorted({n.rpartition('.')[2] for n in linear}))})"
            )
        chosen |= found
    return [name for name in linear if name in chosen]


def apply(config: LoRA, model: nn.Module) -> None:
    names = targets(config, model)
    freeze(model)
    for name in names:
        swap(model, name, LoRALinear(model.get_submodule(name), config))
