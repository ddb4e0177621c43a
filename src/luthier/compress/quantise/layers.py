"""The layers that are rounded: which they are, their grids and codes, and the network with them in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import surgery
from ...errors import ConfigError, ModelError
from ...precision.linear import ROUTERS
from .calibration import Documents, Unit, stream
from .folding import folded
from .rounding import awq, gptq, nearest, nf4
from .schemes import GROUPS, WHOLE_ROW, Quantising

Say = Callable[[str], None]


@dataclass
class Rounded:
    """A layer's weight as it is stored."""

    codes: Tensor  # [out, in] int8, or float8
    grid: nearest.Grid
    group: int
    """Weights that share a scale; -1 for a row."""

    @property
    def bits(self) -> int:
        return self.grid.bits

    def weight(self) -> Tensor:
        """[out, in] in float32."""
        return self.grid.weight(self.codes.float())


def names(model: Any) -> list[str]:
    """The linear layers inside of the blocks, but those that route tokens to experts. ModelError where weights would
    be left that no format has in fewer bits."""
    prefix, blocks = surgery.blocks(model)
    for name, p in blocks.named_parameters():
        if p.ndim > 2 and "conv" not in name:
            raise ModelError(
                f"{prefix}.{name} holds the layers of several experts in one, which would stay as they are: a model "
                "with fused experts cannot be quantised here"
            )
    found = []
    for name, module in model.named_modules():
        if not name.startswith(prefix + ".") or not surgery.linear_shape(module):
            continue
        if surgery.transposed(module):
            raise ModelError(f"{name} keeps its weight as [in, out], which no format of quantised layers has")
        if name.rpartition(".")[2] not in ROUTERS:
            found.append(name)
    return found


def group_of(model: Any, named: Sequence[str], wanted: Quantising) -> int:
    """The weights that share a scale; ConfigError where it does not divide every layer."""
    inputs = {name: model.get_submodule(name).weight.shape[1] for name in named}
    if wanted.group_size is None:
        if not wanted.kind.grouped:
            return WHOLE_ROW
        fits = [g for g in GROUPS if all(n % g == 0 for n in inputs.values())]
        if not fits:
            worst = next(name for name, n in inputs.items() if n % GROUPS[-1])
            n = inputs[worst]
            raise ConfigError(f"--group-size: none of 128, 64, 32 divides the {n} inputs of {worst}: name one")
        return fits[0]
    if wanted.group_size != WHOLE_ROW:
        for name, n in inputs.items():
            if n % wanted.group_size:
                fit = max((g for g in (*GROUPS, 16, 8) if n % g == 0 and g < wanted.group_size), default=WHOLE_ROW)
                raise ConfigError(
                    f"--group-size={wanted.group_size} does not divide the {n} inputs of {name}: use {fit}"
                )
    return wanted.group_size


def cost(bits: int, group: int, inputs: int, dtype: torch.dtype) -> float:
    """Bits of a weight with its share of scales."""
    return bits + dtype.itemsize * 8 / (group if group > 0 else inputs)


def grid(
    weight: Tensor, wanted: Quantising, bits: int, group: int, dtype: torch.dtype, importance: Tensor | None = None
) -> nearest.Grid:  # fmt: skip
    """Of a weight, with scales in the numbers of the file."""
    if wanted.kind.numbers == "float":
        return nearest.float8(weight, wanted.per_tensor, dtype)
    return nearest.grid(weight, bits, group, search=wanted.ranges == "mse", dtype=dtype, importance=importance)


@torch.no_grad()
def rounded_(
    model: Any, named: Sequence[str], documents: Documents, wanted: Quantising, many: Mapping[str, int],
    dtype: torch.dtype, group: int, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Round the layers, in place: the network computes with what the codes stand for. `many` are the layers with other
    bits than the scheme's, which have a scale for each output. Of each layer a `Rounded`, or `nf4.Blocks`."""

    def how(name: str) -> tuple[int, int]:
        return (many[name], WHOLE_ROW) if name in many else (wanted.kind.bits, group)

    made: dict[str, Any] = {}
    if wanted.kind.numbers == "nf4":
        for name in named:
            layer = model.get_submodule(name)
            made[name] = nf4.rounded(layer.weight.data, dtype)
            layer.weight.data = made[name].weight().to(layer.weight.dtype)
        return made
    if wanted.rounding == "nearest":
        for name in named:
            bits, own = how(name)
            layer = model.get_submodule(name)
            g = grid(layer.weight.data, wanted, bits, own, dtype)
            made[name] = _put(layer, g, g.codes(layer.weight.data), own)
        return made
    flow, depth = stream(model, documents), len(surgery.blocks(model)[1])
    for at in range(depth):
        units, scaled = flow.observed(named), 0
        if wanted.rounding == "awq":
            scaled = sum(_scaled(flow, unit, wanted, how, dtype) for unit in units)
        for unit in units:
            for name, layer in zip(unit.names, unit.layers):
                made[name] = _put(layer, *_codes(layer.weight.data, unit, wanted, *how(name), dtype), how(name)[1])
            unit.forget()
        flow.advance()
        told = f"; inputs of {scaled} of {len(units)} groups of layers scaled" if wanted.rounding == "awq" else ""
        say(f"{wanted.rounding}: block {at + 1} of {depth}{told}")
    return made


def _put(layer: Any, g: nearest.Grid, codes: Tensor, group: int) -> Rounded:
    kept = Rounded(codes.to(torch.float8_e4m3fn if g.float8 else torch.int8), g, group)
    layer.weight.data = kept.weight().to(layer.weight.dtype)
    return kept


def _codes(
    weight: Tensor, unit: Unit, wanted: Quantising, bits: int, group: int, dtype: torch.dtype
) -> tuple[nearest.Grid, Tensor]:  # fmt: skip
    if unit.hessian is None:  # experts that no row came to
        g = grid(weight, wanted, bits, group, dtype)
        return g, g.codes(weight)
    h = unit.hessian / unit.tokens
    g = grid(weight, wanted, bits, group, dtype, h.diagonal())
    if wanted.rounding == "gptq":
        codes = gptq.codes(weight, h, g, damping=wanted.damping)
        return gptq.refitted(weight, h, codes, g), codes
    return g, g.codes(weight)


def _scaled(flow: Any, unit: Unit, wanted: Quantising, how: Callable, dtype: torch.dtype) -> bool:
    """Whether the inputs of a unit were scaled."""
    if unit.hessian is None:
        return False
    h, sizes = unit.hessian / unit.tokens, unit.sizes
    bits, group = how(unit.names[0])
    plain = wanted.model_copy(update={"ranges": "min_max"})

    def rounding(weight: Tensor, scales: Tensor) -> Tensor:
        return grid(weight, plain, bits, group, dtype).nearest(weight)

    scales, before, after = awq.search([layer.weight.data for layer in unit.layers], h, sizes, rounding)
    if not after < before or not folded(flow, unit, scales):
        return False
    unit.scaled(scales)
    return True
