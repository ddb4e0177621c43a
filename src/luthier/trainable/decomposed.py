"""DoRA's arithmetic (arXiv:2402.09353): rows of W + s B A of a length that is trained, without ever making them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..surgery import Adapter, QuantisedLinear, dense, transposed
from .low_rank import LowRank


class Decomposed(LowRank):
    """g (base(x) - bias + s B A dropout(x)) + bias with g = m / |W + s B A|, m trained, one for each output.

    |.| is the length of a row [out]. No gradient passes through it (section 4.3 of the paper): with v = W + s B A,
    dL/dm = (dL/dy . v x) / |v| and dL/dv = g dL/dy x^T. Worked by hand for W = [[3, 0], [0, 2]], s = 1, B = [[4], [0]],
    A = [[0, 1]], m = [10, 2], x = [1, 1] and dL/dy = [1, 1]: v = [[3, 4], [0, 2]], |v| = [5, 2], g = [2, 1],
    v x = [7, 2] and y = [14, 2]; dL/dm = [7 / 5, 2 / 2] = [1.4, 1]; dL/dv = [[2, 2], [1, 1]]; so
    dL/dB = dL/dv A^T = [[2], [1]] and dL/dA = B^T dL/dv = [[8, 8]]. Through |v|, dL/dB would be [[-0.24], [0]].

    |v|^2 = |W|^2 + 2 s W A^T . B + s^2 B (A A^T) . B, row by row: |W|^2 is kept, and what is left are products with r
    columns. They are made in the numbers that x is computed in, and added up in float32.

    Dropout acts on what goes into A alone. (PEFT's also puts (g - 1) W behind it, at the price of another product.)
    """

    def start(self, layer: Any) -> None:
        super().start(layer)
        weight = dense(layer.base)["weight"].detach()
        layer.register_buffer("squared", weight.square().sum(1), persistent=False)  # [out], of W alone
        layer.lora_magnitude_vector = nn.Parameter(layer.squared.sqrt())

    def forward(self, layer: Any, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = layer.base(x)
        down, up = (factor.to(x.dtype) for factor in self.factors(layer))
        gain = layer.lora_magnitude_vector / self.lengths(layer, down, up)
        if self.dropout and layer.training:
            x = F.dropout(x, self.dropout)
        bias = _bias(layer.base)
        if torch.compiler.is_compiling():  # the turned product is kept in the dtype of x, and what follows is fused
            made = gain * (y + F.linear(F.linear(x, down) * self.scaling, up))
            made = (made if bias is None else made + (1 - gain) * bias).to(y.dtype)
        else:
            made = _Turned.apply(y, x, down, up, gain, self.scaling, bias)
        return made if layer.share == 1.0 else y + layer.share * (made - y)

    @torch.no_grad()
    def lengths(self, layer: Any, down: Tensor, up: Tensor) -> Tensor:
        """|W + s B A| [out] in float32; of a base that is adapted itself, from the whole sum."""
        if isinstance(layer.base, Adapter):
            weight = dense(layer.base)["weight"]
            return _floor((weight + self.scaling * (up.float() @ down.float())).square().sum(1))
        weight, wide = _weight(layer.base, down.dtype), up.float()
        cross = ((weight @ down.t()).float() * wide).sum(1)
        small = down.float()
        inner = (small[:, None] * small).sum(-1)  # A A^T; as a float32 product of so few rows it would be slow on a GPU
        own = ((wide @ inner) * wide).sum(1)
        return _floor(layer.squared + 2 * self.scaling * cross + self.scaling**2 * own)

    def merge(self, layer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        down, up = self.factors(layer)
        weight = tensors["weight"]
        turned = weight + self.scaling * (up @ down)
        gain = layer.lora_magnitude_vector / _floor(turned.detach().square().sum(1))
        made = gain[:, None] * turned
        return tensors | {"weight": made if layer.share == 1.0 else weight + layer.share * (made - weight)}

    def saved(self, layer: Any) -> dict[str, Tensor]:
        return super().saved(layer) | {"lora_magnitude_vector": layer.lora_magnitude_vector}


def _floor(squared: Tensor) -> Tensor:
    """Lengths from their squares; of a row of zeros one that can be divided by."""
    return squared.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """[out, in] as the base multiplies with it."""
    if isinstance(base, QuantisedLinear):
        return base.dequantize(dtype)
    return base.weight.detach().t() if transposed(base) else base.weight.detach()


def _bias(base: Any) -> Tensor | None:
    return _bias(base.base) if isinstance(base, Adapter) else base.bias


class _Turned(torch.autograd.Function):
    """gain * (y + scaling * up(down(x))) + (1 - gain) * bias, with skinny products as quick as they can be."""

    @staticmethod
    def forward(ctx, y, x, down, up, gain, scaling, bias):  # [..., out], [..., in], [r, in], [out, r], [out], [out]
        flat = x.flatten(0, -2)
        z = flat @ down.t()  # [n, r]
        turned = torch.addmm(y.flatten(0, -2), z, up.t(), alpha=scaling)
        ctx.save_for_backward(flat, z, down, up, turned, gain, bias)
        ctx.scaling = scaling
        made = turned * gain
        if bias is not None:
            made += (1 - gain) * bias
        return made.to(y.dtype).view(y.shape)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        x, z, down, up, turned, gain, bias = ctx.saved_tensors
        flat = upstream.flatten(0, -2)
        through = (flat * gain).to(flat.dtype)
        dz = through @ (up * ctx.scaling)
        dx = (dz @ down).view(*upstream.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        wide = flat.float()
        dgain = (wide * turned).sum(0)
        if bias is not None:
            dgain = dgain - wide.sum(0) * bias
        dup = ((z.t() * ctx.scaling) @ through).t()
        return through.view(upstream.shape), dx, dz.t() @ x, dup, dgain, None, None
