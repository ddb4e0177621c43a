"""AWQ's scales put where they cost nothing: into the norm, or the rows of the layer, that the inputs come from.

Whether it is exact is measured: the block must give what it gave, else the scales are taken out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ... import surgery
from .calibration import Stream, Unit

EXACT = 1e-4  # relative change of a block's output that float32 makes by itself


@torch.no_grad()
def folded(stream: Stream, unit: Unit, scales: Tensor) -> bool:
    """Multiply the weights of a unit's inputs by `scales` [in] and divide what makes them; False where nothing that
    does it exactly was found, and all is as it was."""
    before = stream.run(0)
    size = before.abs().max().clamp(min=1e-6)
    own = [(layer.weight, layer.weight.data.clone()) for layer in unit.layers]
    for divide, kept in _ways(stream, unit):
        for layer in unit.layers:
            layer.weight.data.mul_(scales)
        divide(scales)
        if float((stream.run(0) - before).abs().max() / size) < EXACT:
            return True
        for parameter, was in [*own, *kept]:
            parameter.data.copy_(was)
    return False


def _ways(stream: Stream, unit: Unit) -> Iterator[tuple[Callable[[Tensor], None], list[tuple[Any, Tensor]]]]:
    """How the inputs may be divided, and what that changes."""
    norm: Any = unit.norm
    if norm is not None:
        tensors = [p for p in (norm.weight, getattr(norm, "bias", None)) if p is not None]
        kept = [(p, p.data.clone()) for p in tensors]
        yield (lambda s: _divide(tensors, s)), kept
        # Gemma's norms multiply by 1 + weight.
        yield (lambda s: norm.weight.data.copy_((1 + norm.weight.data) / s - 1)), kept
        return
    wide = unit.layers[0].weight.shape[1]
    inside = [m for m in stream.block.modules() if isinstance(m, nn.Linear) and m not in unit.layers]
    for layer in reversed(inside):
        if surgery.linear_shape(layer) and layer.weight.shape[0] == wide:
            tensors = [p for p in (layer.weight, layer.bias) if p is not None]
            yield (lambda s, t=tensors: _divide(t, s)), [(p, p.data.clone()) for p in tensors]


def _divide(tensors: list[Any], scales: Tensor) -> None:
    for p in tensors:
        p.data.div_(scales.view(-1, *[1] * (p.ndim - 1)))
