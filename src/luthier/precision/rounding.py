"""The grids of each scheme: scales, rounding to integers or float8 with straight-through gradients, packing.

The straight-through estimator (arXiv:1308.3432) takes the derivative of rounding for one and that of a clip for zero
outside of its range; scales are constants of the backward pass. Numbers are those of torchao, where it has the scheme.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
SMALLEST = torch.finfo(torch.float32).smallest_normal  # a scale of a row of zeros


@dataclass(frozen=True)
class Grid:
    """Of weights: `bits` wide, integers or float8; of the activations beside them: int8, float8 or none."""

    bits: int
    weights: str = "int"
    activations: str | None = None

    @property
    def lowest(self) -> float:
        return -(2.0 ** (self.bits - 1)) if self.weights == "int" else -torch.finfo(FLOAT8).max

    @property
    def highest(self) -> float:
        return -self.lowest - 1 if self.weights == "int" else -self.lowest


GRIDS = {
    "int8-dynamic-act-int4-weight": Grid(4, activations="int8"),
    "int8-dynamic-act-int8-weight": Grid(8, activations="int8"),
    "int4-weight-only": Grid(4),
    "fp8": Grid(8, "float8", "float8"),
}


def _through(rounded: Tensor, x: Tensor) -> Tensor:
    """The rounded values exactly, with the gradient passed to x as if it had not been rounded."""
    return rounded.detach() + (x - x.detach())


def _round(x: Tensor) -> Tensor:
    """To the nearest integer, halves to even."""
    return _through(x.round(), x)


def _round_float8(x: Tensor) -> Tensor:
    """To the nearest float8 e4m3, in float32."""
    return _through(x.detach().to(FLOAT8).float(), x)


def scales(weight: Tensor, grid: Grid, group: int, dtype: torch.dtype) -> Tensor:
    """[out, groups] of a weight [out, in] in float32, rounded to `dtype`, in which files keep them.

    Symmetric: integers have the largest magnitude of a group at half their range (7.5 of 4 bits), so that an extreme
    positive value is cut by half a step; float8 has it at its own largest value. `group` -1 is a whole row.
    """
    most = weight.detach().unflatten(-1, (-1, group if group > 0 else weight.shape[-1])).abs().amax(-1)
    span = (grid.highest - grid.lowest) / 2
    return (most / span).clamp(min=SMALLEST).to(dtype)


def on_grid(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """What a weight [out, in] is stored as: integers, or float8 values, in float32."""
    wide = scale.float()[..., None]
    grouped = weight.unflatten(-1, (scale.shape[-1], -1))
    if grid.weights == "int":
        values = _round(grouped * (1 / wide)).clamp(grid.lowest, grid.highest)
    else:
        values = _round_float8((grouped / wide).clamp(grid.lowest, grid.highest))
    return values.flatten(-2)


def off_grid(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that is multiplied, of what is stored and its scales."""
    grouped = values.float().unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale.float()[..., None]).flatten(-2).to(dtype)


def rounded_weight(
    weight: Tensor, grid: Grid, group: int, dtype: torch.dtype, kept_in: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    """A float32 weight [out, in] as it is multiplied in `dtype` once it is stored, with scales in that or another."""
    scale = scales(weight, grid, group, kept_in or dtype)
    return off_grid(on_grid(weight, scale, grid), scale, dtype)


def rounded_activations(x: Tensor, grid: Grid) -> Tensor:
    """Inputs [..., in] as they are multiplied: a scale for each token, int8 with a zero point beside it."""
    if grid.activations is None:
        return x
    wide = x.float()
    if grid.activations == "float8":
        largest = torch.finfo(FLOAT8).max
        scale = (wide.detach().abs().amax(-1, keepdim=True) / largest).clamp(min=SMALLEST)
        return (_round_float8((wide / scale).clamp(-largest, largest)) * scale).to(x.dtype)
    low = wide.detach().amin(-1, keepdim=True).clamp(max=0)
    high = wide.detach().amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=SMALLEST)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    values = (_round(wide * (1 / scale)) + zero).clamp(-128, 127)
    return ((values - zero) * scale).to(x.dtype)


def pack(values: Tensor, bits: int = 4) -> Tensor:
    """Signed integers [out, in] of 4 or 8 bits in words [out, in * bits / 32] of int32, the first the lowest."""
    each = 32 // bits
    padded = torch.nn.functional.pad(values.to(torch.int64) + (1 << bits - 1), (0, -values.shape[-1] % each))
    shifts = torch.arange(0, 32, bits, device=values.device)
    words = (padded.unflatten(-1, (-1, each)) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: Tensor, inputs: int, bits: int = 4) -> Tensor:
    """The integers [out, in] as int8 of what `pack` made."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    values = ((words[..., None] >> shifts) & ((1 << bits) - 1)) - (1 << bits - 1)
    return values.flatten(-2)[..., :inputs].to(torch.int8)
