"""Clipping of the mean gradient: by its norm, by value or unit by unit (arXiv:2102.06171); how often it happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import AdaptiveClipping, Clipping, NormClipping, ValueClipping


class Clipper:
    """Clips and counts. The gradients are the same on all ranks by then, and so is all that is counted."""

    def __init__(self, config: Clipping, roles: Mapping[str, str] | None = None):
        self.config, self.roles = config, roles or {}
        self.steps, self.clipped, self.largest = 0, 0, 0.0
        self._hits: list[Tensor] = []  # [] bool, of this step

    @property
    def each(self) -> Callable[[str, Tensor, Tensor], None] | None:
        """What is done to each parameter's mean gradient, or None where a common scale is all."""
        if isinstance(self.config, ValueClipping):
            return self._by_value
        if isinstance(self.config, AdaptiveClipping):
            return self._by_unit
        return None

    def scale(self, norm: Tensor) -> Tensor:
        """What gradients of this norm are multiplied by: at most 1."""
        if isinstance(self.config, NormClipping):
            return clip_scale(norm, self.config.max_grad_norm)
        return torch.ones_like(norm)

    def _by_value(self, name: str, gradient: Tensor, weight: Tensor) -> None:
        assert isinstance(self.config, ValueClipping)
        bound = self.config.clip_value
        self._hits.append((gradient.abs() > bound).any())
        gradient.clamp_(-bound, bound)

    def _by_unit(self, name: str, gradient: Tensor, weight: Tensor) -> None:
        assert isinstance(self.config, AdaptiveClipping)
        role = self.roles.get(name)
        if role == "head":
            return
        norm, weights = (unit_norms(t, role == "transposed") for t in (gradient, weight))
        bound = weights.clamp_min_(self.config.clip_epsilon).mul_(self.config.clip_factor)
        over = norm > bound
        self._hits.append(over.any())
        gradient.mul_(torch.where(over, bound / norm, 1.0))

    def record(self, norm: float) -> bool:
        """Whether the step just taken was clipped; `norm` is that of its mean gradient before."""
        if isinstance(self.config, NormClipping):
            clipped = norm > self.config.max_grad_norm
        else:
            clipped = bool(torch.stack(self._hits).any()) if self._hits else False
        self._hits = []
        self.steps += 1
        self.clipped += clipped
        self.largest = max(self.largest, norm) if math.isfinite(norm) else self.largest
        return clipped

    def figures(self) -> dict[str, float]:
        """Over the whole run so far."""
        return {"clipped_share": self.clipped / max(1, self.steps), "largest_grad_norm": self.largest}

    # ------------------------------------------------------------------ a part of the checkpoint
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def numbers(self) -> dict:
        return {"steps": self.steps, "clipped": self.clipped, "largest": self.largest}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        self.steps, self.clipped, self.largest = numbers["steps"], numbers["clipped"], numbers["largest"]


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by so that it is at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def unit_norms(tensor: Tensor, transposed: bool = False) -> Tensor:
    """Norms in float32 of the rows of [..., out, in], of the columns of [in, out], or of a vector, to be broadcast."""
    if tensor.ndim < 2:
        return torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return torch.linalg.vector_norm(tensor, dim=-2 if transposed else -1, keepdim=True, dtype=torch.float32)
