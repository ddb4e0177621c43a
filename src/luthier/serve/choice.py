"""Which adapters act on which rows of a step: several LoRAs on one base, each request with its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import surgery
from ..surgery import Adapter, innermost, linear_shape
from ..trainable.low_rank import LowRank

Names = frozenset[str]
Segment = tuple[int, int, Names]  # rows from, to, and the adapters that are on for them


class Mixed(RuntimeError):
    """A layer whose rows are not those of the step, such as an expert's: adapters cannot be told apart there."""


class Choice:
    """Set before each pass; layers ask it."""

    def __init__(self, model: Any):
        self.switched = surgery.switched(model)
        self.layers = [module for _, module in surgery.outer(model) if isinstance(module, Adapter)]
        self.first = {module: module.enabled for module in self.switched}
        self.segments: list[Segment] = []
        self._on: Names | None = None

    @property
    def at_start(self) -> Names:
        return frozenset(module.name for module, on in self.first.items() if on)

    def begin(self, segments: Sequence[tuple[int, Names]]) -> None:
        """(how many rows, which adapters) one after another; neighbours with the same adapters become one."""
        joined: list[Segment] = []
        for count, names in segments:
            start = joined[-1][1] if joined else 0
            if joined and joined[-1][2] == names:
                joined[-1] = (joined[-1][0], start + count, names)
            else:
                joined.append((start, start + count, names))
        self.segments = joined
        uniform = len(joined) == 1
        for layer in self.layers:
            layer.choice = None if uniform else self
        if uniform and joined[0][2] != self._on:
            self._on = joined[0][2]
            _switch(self.switched, self._on)

    def end(self) -> None:
        """As it was."""
        for layer in self.layers:
            layer.choice = None
        for module, on in self.first.items():
            module.enabled = on
        self._on = None

    def __call__(self, layer: Adapter, *inputs: Any, **more: Any) -> Any:
        self._on = None
        total = self.segments[-1][1]
        stack = _stack(layer)
        if len(inputs) == 1 and not more and linear_shape(layer) and all(type(a.rule) is LowRank for a in stack):
            return self._low_rank(stack, innermost(layer), inputs[0], total)
        dims = [_rows(x, total) for x in inputs]
        if any(isinstance(x, Tensor) for x in more.values()):
            raise Mixed("a layer that is given tensors by name")
        outs = []
        for start, end, names in self.segments:
            _switch(stack, names)
            own = [x if d is None else x.narrow(d, start, end - start) for x, d in zip(inputs, dims)]
            outs.append(layer.rule.forward(layer, *own, **more) if layer.enabled else layer.base(*own, **more))
        if not all(isinstance(out, Tensor) for out in outs):
            raise Mixed("a layer that gives more than a tensor")
        return torch.cat(outs, next(d for d in dims if d is not None))

    def _low_rank(self, stack: list[Adapter], base: Any, x: Tensor, total: int) -> Tensor:
        """One product with the base for all rows, and the small ones of each adapter for its own."""
        dim = _rows(x, total)
        y = base(x)
        flat, out = (t[0] if dim else t for t in (x, y))
        for start, end, names in self.segments:
            for adapter in stack:
                if adapter.name in names:
                    down, up = (factor.to(x.dtype) for factor in adapter.rule.factors(adapter))  # type: ignore
                    scaling = adapter.rule.scaling * adapter.share  # type: ignore
                    out[start:end] += F.linear(F.linear(flat[start:end], down), up) * scaling
        return y


def _switch(modules: Collection[surgery.Switched], names: Names) -> None:
    for module in modules:
        if module.enabled != (module.name in names):
            module.enabled = module.name in names


def _stack(layer: Any) -> list[Adapter]:
    """From the inside out."""
    return [*_stack(layer.base), layer] if isinstance(layer, Adapter) else []


def _rows(x: Any, total: int) -> int | None:
    """The dimension of a tensor that the rows of a step lie in; None of what is no tensor."""
    if not isinstance(x, Tensor):
        return None
    if x.ndim > 1 and x.shape[0] == 1 and x.shape[1] == total:
        return 1
    if x.ndim and x.shape[0] == total:
        return 0
    raise Mixed(f"a layer that is given {list(x.shape)} in a step of {total} rows")
