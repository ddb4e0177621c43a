"""Rounding to the nearest: ranges of groups, with or without a zero point, to the extremes or searched for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....precision.rounding import FLOAT8, SMALLEST

NARROWER = 20  # steps of the search for a range, from the extremes to 60 % of them
NARROWEST = 0.6
ROWS = 1 << 22  # weights that are searched at once


@dataclass(frozen=True)
class Grid:
    """Where a group of weights may land: (code - zero) * scale, with integers of so many bits or float8 codes."""

    scale: Tensor  # [out, groups], in the numbers of the file
    zero: Tensor | None = None  # [out, groups] integers in float32
    bits: int = 8
    float8: bool = False

    @property
    def lowest(self) -> float:
        return -(2.0 ** (self.bits - 1)) if not self.float8 else -torch.finfo(FLOAT8).max

    @property
    def highest(self) -> float:
        return 2.0 ** (self.bits - 1) - 1 if not self.float8 else torch.finfo(FLOAT8).max

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes of a weight [out, in], halves to even, in float32."""
        wide = self.scale.float()[..., None]
        grouped = weight.float().unflatten(-1, (self.scale.shape[-1], -1))
        if self.float8:
            return (grouped / wide).clamp(self.lowest, self.highest).to(FLOAT8).float().flatten(-2)
        values = (grouped / wide).round()
        if self.zero is not None:
            values = values + self.zero[..., None]
        return values.clamp(self.lowest, self.highest).flatten(-2)

    def weight(self, codes: Tensor) -> Tensor:
        """[out, in] in float32 what the codes stand for."""
        grouped = codes.float().unflatten(-1, (self.scale.shape[-1], -1))
        if self.zero is not None:
            grouped = grouped - self.zero[..., None]
        return (grouped * self.scale.float()[..., None]).flatten(-2)

    def nearest(self, weight: Tensor) -> Tensor:
        """The weight rounded, in float32."""
        return self.weight(self.codes(weight))


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """Of ranges [out, groups], with scales rounded to `dtype`."""
    steps = 2**bits - 1
    if symmetric:  # as precision/rounding.py: the larger end is half a step beyond the last positive code
        scale = torch.maximum(-low, high) * 2 / steps
        return Grid(scale.clamp(min=SMALLEST).to(dtype), None, bits)
    scale = ((high.clamp(min=0) - low.clamp(max=0)) / steps).clamp(min=SMALLEST).to(dtype)
    least = -(2.0 ** (bits - 1))
    zero = (least - (low.clamp(max=0) / scale.float()).round()).clamp(least, -least - 1)
    return Grid(scale, zero, bits)


def grid(
    weight: Tensor,
    bits: int,
    group: int = -1,
    *,
    symmetric: bool = True,
    search: bool = False,
    dtype: torch.dtype = torch.float32,
    importance: Tensor | None = None,
) -> Grid:
    """The integers of a weight [out, in]: to the extremes of each group, or, by `search`, as much narrower as makes
    sum_i importance_i (w_i - round(w_i))^2 of the group smallest; `importance` [in] is the mean square of each input.
    """
    size = group if group > 0 else weight.shape[-1]
    rows = max(1, ROWS // weight.shape[-1])
    found = [
        _of_rows(part, bits, size, symmetric, search, dtype, importance) for part in weight.detach().float().split(rows)
    ]
    zero = None if symmetric else torch.cat([g.zero for g in found if g.zero is not None])
    return Grid(torch.cat([g.scale for g in found]), zero, bits)


def _of_rows(weight, bits, size, symmetric, search, dtype, importance) -> Grid:
    grouped = weight.unflatten(-1, (-1, size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    widest = _grid(low, high, bits, symmetric, dtype)
    if not search:
        return widest
    scale, zero = widest.scale.clone(), None if widest.zero is None else widest.zero.clone()
    least = None
    for step in range(NARROWER + 1):
        share = 1 - (1 - NARROWEST) * step / NARROWER
        made = _grid(low * share, high * share, bits, symmetric, dtype)
        error = (made.nearest(weight) - weight).square()
        if importance is not None:
            error = error * importance
        error = error.unflatten(-1, (-1, size)).sum(-1)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        least = error if least is None else torch.where(better, error, least)
        scale = torch.where(better, made.scale, scale)
        if zero is not None and made.zero is not None:
            zero = torch.where(better, made.zero, zero)
    return Grid(scale, zero, bits)


def float8(weight: Tensor, per_tensor: bool = False, dtype: torch.dtype = torch.float32) -> Grid:
    """float8 e4m3 (arXiv:2209.05433): the largest magnitude of a row, or of all, becomes 448."""
    most = weight.detach().float().abs().amax(-1, keepdim=True)
    if per_tensor:
        most = most.amax(0, keepdim=True).expand_as(most)
    scale = (most / torch.finfo(FLOAT8).max).clamp(min=SMALLEST).to(dtype)
    return Grid(scale, None, 8, float8=True)
