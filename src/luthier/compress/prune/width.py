"""Structured pruning in width: groups of heads, feed-forward channels and dimensions of the stream that do least go.

Sizes are the same in all layers; which heads and channels stay, each layer has its own
(https://arxiv.org/abs/2407.14679).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from .families import CHANNELS, HIDDEN, KEYS, QUERIES, SCALED, Sizes, axes
from .importance import Parts
from .settings import Pruning

GRID = 400  # factors that are tried for a target
NEAR = 0.01  # of the target: how far from it a shape may be


# ---------------------------------------------------------------------------- sizes


def parameters(shapes: Mapping[str, tuple[int, ...]], sizes: Sizes) -> int:
    """Parameters outside of embeddings and head with other sizes, of tensors that have these shapes now."""
    total = 0
    for name, shape in shapes.items():
        if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            total += prod(sizes.length(axis) or old for axis, old in zip(axes(name), shape))
    return total


def fitted(shapes: Mapping[str, tuple[int, ...]], now: Sizes, wanted: Pruning) -> Sizes:
    """The sizes that are asked for by `shape`, or those nearest to `target`, all dimensions shrunk about alike."""
    if wanted.shape:
        return _named(now, wanted.shape)
    assert wanted.target is not None, "checked with the settings"
    whole, best = parameters(shapes, now), None
    for step in range(1, GRID + 1):
        factor = step / GRID
        made = _shrunk(now, factor, wanted)
        if "channels" in wanted.dimensions:
            made = _balanced(shapes, made, now, wanted.target * whole, wanted.multiple)
        off = abs(parameters(shapes, made) / whole - wanted.target)
        uneven = abs(made.channels / now.channels - factor) if "channels" in wanted.dimensions else 0.0
        rank = (off > NEAR * wanted.target, round(off, 3) if off > NEAR * wanted.target else 0.0, uneven, off)
        if best is None or rank < best[0]:
            best = (rank, made)
    assert best is not None
    reached = parameters(shapes, best[1]) / whole
    if abs(reached - wanted.target) > 0.05:
        raise ModelError(
            f"--target={wanted.target:g}: with --dimensions {' '.join(wanted.dimensions)} the nearest is "
            f"{reached:.3f}: name more dimensions, or another target"
        )
    return best[1]


def _named(now: Sizes, shape: Mapping[str, int]) -> Sizes:
    fields = {"hidden_size": "hidden", "intermediate_size": "channels", "num_attention_heads": "heads",
              "num_key_value_heads": "groups"}  # fmt: skip
    made = replace(now, **{fields[key]: size for key, size in shape.items()})
    if "num_attention_heads" not in shape:
        made = replace(made, heads=made.groups * (now.heads // now.groups))
    for key, field in fields.items():
        if getattr(made, field) > getattr(now, field):
            raise ModelError(f"--shape {key}={getattr(made, field)}: the model has {getattr(now, field)}")
    if made.heads % made.groups:
        raise ModelError(
            f"--shape num_attention_heads={made.heads}: not a multiple of "
            f"num_key_value_heads={made.groups}, which heads share"
        )
    if made == now:
        raise ModelError("--shape: these are the model's own sizes")
    return made


def _shrunk(now: Sizes, factor: float, wanted: Pruning) -> Sizes:
    groups = max(1, round(now.groups * factor)) if "heads" in wanted.dimensions else now.groups
    width = _rounded(now.hidden * factor, wanted.multiple, now.hidden) if "hidden" in wanted.dimensions else now.hidden
    return replace(
        now, groups=groups, heads=groups * (now.heads // now.groups),
        hidden=width,
    )  # fmt: skip


def _balanced(shapes: Mapping, made: Sizes, now: Sizes, target: float, multiple: int) -> Sizes:
    """With as many channels as bring the parameters nearest to the target."""
    least, more = (parameters(shapes, replace(made, channels=n)) for n in (1, 2))
    return replace(made, channels=_rounded(1 + (target - least) / (more - least), multiple, now.channels))


def _rounded(size: float, multiple: int, most: int) -> int:
    return min(max(multiple, round(size / multiple) * multiple), most)


# ---------------------------------------------------------------------------- what stays


@dataclass(frozen=True)
class Kept:
    """Indices that stay, ascending."""

    hidden: Tensor  # [hidden]
    channels: list[Tensor]  # of each layer
    heads: list[Tensor]
    groups: list[Tensor]


def largest(values: Tensor, count: int) -> Tensor:
    """The places of the largest values [N], ascending; of equal ones the earlier."""
    return torch.sort(values, descending=True, stable=True).indices[:count].sort().values


def chosen(found: Parts, now: Sizes, new: Sizes) -> Kept:
    """Groups by the sum over their heads; in each group that stays its largest heads."""
    heads, groups = [], []
    each, left = now.heads // now.groups, new.heads // new.groups
    for row in found.heads:
        of_groups = row.view(now.groups, each)
        groups.append(largest(of_groups.sum(1), new.groups))
        heads.append(torch.cat([g * each + largest(of_groups[g], left) for g in groups[-1].tolist()]))
    channels = [largest(row, new.channels) for row in found.channels]
    return Kept(largest(found.hidden, new.hidden), channels, heads, groups)


def narrowed(config: Any, state: Mapping[str, Tensor], kept: Kept, new: Sizes) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and tensors of what stays."""
    made = copy.deepcopy(config)
    made.hidden_size, made.intermediate_size = new.hidden, new.channels
    made.num_attention_heads, made.num_key_value_heads, made.head_dim = new.heads, new.groups, new.head_dim

    def places(heads: Tensor) -> Tensor:
        return (heads[:, None] * new.head_dim + torch.arange(new.head_dim, device=heads.device)).flatten()

    out = {}
    for name, tensor in state.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        chosen = {HIDDEN: kept.hidden, CHANNELS: kept.channels[layer], QUERIES: places(kept.heads[layer]),
                  KEYS: places(kept.groups[layer])}  # fmt: skip
        for dim, axis in enumerate(axes(name)):
            if axis is not None and len(chosen[axis]) != tensor.shape[dim]:
                tensor = tensor.index_select(dim, chosen[axis].to(tensor.device))
        out[name] = tensor
    return made, out


def rescaled(state: dict[str, Tensor], kept: Tensor, energy: Mapping[str, Tensor]) -> None:
    """Norms over fewer dimensions divide by another root mean square: their weights are multiplied by the ratio, as it
    is on average, so that what they give keeps its size."""
    for name, squares in energy.items():
        factor = (squares[kept].mean() / squares.mean()).sqrt()
        state[f"{name}.weight"] = (state[f"{name}.weight"].float() * factor).to(state[f"{name}.weight"].dtype)


def check_hidden(config: Any, new: Sizes) -> None:
    if new.hidden != config.hidden_size and config.model_type in SCALED:
        raise ModelError(
            f"--by width: {config.model_type} multiplies its embeddings, which are its head, too, by the root of "
            "hidden_size, so that cannot shrink: use --dimensions heads channels"
        )
