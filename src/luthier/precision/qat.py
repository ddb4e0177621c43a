"""Quantisation-aware training (arXiv:1712.05877): layers that compute with rounded weights and activations.

What is rounded is the weight with its adapters merged, W + s B A of a LoRA (arXiv:2406.06385), so that one quantised
model comes out and no adapter beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..surgery import Adapter, adapters, blocks, dense, innermost, linear_shape, swap, transposed
from . import QAT, ROUNDING
from .rounding import GRIDS, rounded_activations, rounded_weight


class FakeQuantised:
    """Weights and inputs of a layer rounded as a quantised model rounds them; one rule for all layers of a model.

    Off with all adapters: the base is the plain model. `begun` is of training alone: what is evaluated is always
    rounded, as it is what a conversion would give.
    """

    mergeable = True

    def __init__(self, config: QAT):
        self.config, self.grid = config, GRIDS[config.scheme]
        self.begun = config.fake_quant_after_n_steps == 0
        self.kept_in: torch.dtype | None = None  # scales, where it is not in what is multiplied

    def start(self, layer: Any) -> None:
        layer.kept = None

    def forward(self, layer: Any, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if layer.training and not self.begun:
            return layer.base(x)
        if torch.compiler.is_compiling():  # a compiler decides itself what to make again
            return self._product(_plainly, layer, x)
        if torch.is_grad_enabled():
            layer.kept = None
            return self._product(_Product.apply, layer, x)
        weight, bias = self._kept(layer, x.dtype)
        return F.linear(rounded_activations(x, self.grid), weight, bias)

    def _product(self, product: Callable, layer: Any, x: Tensor) -> Tensor:
        tensors = dense(layer.base)
        y, bias = product(x, tensors["weight"], layer.base, self), tensors.get("bias")
        return y if bias is None else y + bias.to(y.dtype)

    def weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded_weight(weight, self.grid, self.config.group_size, dtype, self.kept_in)

    def _kept(self, layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The rounded weight, kept while nothing below changes: decoding uses it once a token."""
        inside = [m for m in layer.base.modules() if isinstance(m, Adapter)]
        state = (dtype, [(p.data_ptr(), p._version) for p in layer.base.parameters()],
                 [(m.enabled, m.share) for m in inside])  # fmt: skip
        if layer.kept is None or layer.kept[0] != state:
            tensors = dense(layer.base)
            bias = tensors["bias"].to(dtype) if "bias" in tensors else None
            layer.kept = state, self.weight(tensors["weight"], dtype), bias
        return layer.kept[1:]

    def merge(self, layer: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As they are: rounding them is for a conversion, or for another program that quantises."""
        return tensors

    def saved(self, layer: Adapter) -> dict[str, Tensor]:
        return {}


def _plainly(x: Tensor, weight: Tensor, base: Any, rule: FakeQuantised) -> Tensor:
    return F.linear(rounded_activations(x, rule.grid), rule.weight(weight, x.dtype))


class _Product(torch.autograd.Function):
    """The same, but all that is rounded is made again in the backward pass: only x is kept."""

    @staticmethod
    def forward(ctx, x, weight, base, rule):  # [..., in], [out, in] in float32
        ctx.save_for_backward(x)
        ctx.base, ctx.rule = base, rule
        return _plainly(x, weight, base, rule)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        (x,), rule = ctx.saved_tensors, ctx.rule
        weight = dense(ctx.base)["weight"].detach().requires_grad_()
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            inputs, rounded = rounded_activations(x, rule.grid), rule.weight(weight, x.dtype)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            (dx,) = torch.autograd.grad(inputs, x, upstream @ rounded.detach())
        if ctx.needs_input_grad[1]:
            product = upstream.flatten(0, -2).t() @ inputs.detach().flatten(0, -2)
            (dw,) = torch.autograd.grad(rounded, weight, product)
        return dx, dw, None, None


def apply(config: QAT, model: nn.Module) -> None:
    """Round in every linear layer of the network's blocks; head and embeddings stay as they are."""
    rule, group = FakeQuantised(config), config.group_size
    prefix, layers = blocks(model)
    for name, parameter in layers.named_parameters():
        if parameter.ndim > 2:
            raise ModelError(
                f"precision.kind=qat rounds linear layers, and {prefix}.{name} holds {parameter.ndim}-dimensional "
                "weights (of fused experts), which would stay as they are: use precision=as_loaded"
            )
    for name in places(model):
        layer = model.get_submodule(name)
        inputs = linear_shape(layer)[0]  # type: ignore[index]
        if transposed(innermost(layer)):
            raise ModelError(
                f"precision.kind=qat: {name} keeps its weight as [in, out], which no format of quantised layers "
                "has: use precision=as_loaded"
            )
        if group > 0 and inputs % group:
            raise ModelError(
                f"precision.group_size={group} does not divide the {inputs} inputs of {name}: use "
                f"{math.gcd(group, inputs)}, or -1 for a scale for each output"
            )
        swap(model, name, Adapter(layer, rule, ROUNDING))


def places(model: nn.Module) -> list[str]:
    """Where layers are rounded: outside of the adapters that can be merged, inside of those that cannot."""
    prefix, _ = blocks(model)
    found: list[str] = []
    done: tuple[str, ...] = ("\0",)
    for name, module in model.named_modules():
        if name.startswith(prefix + ".") and linear_shape(module) and not name.startswith(done):
            done += (name + ".",)
            while not _mergeable(module):
                name, module = name + ".base", module.base
            found.append(name)
    return found


def _mergeable(module: Any) -> bool:
    """Whether all adapters of a layer, from this one inwards, can be merged into it."""
    return not isinstance(module, Adapter) or (module.rule.mergeable and _mergeable(module.base))


def rounding(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that compute with rounded numbers, by name."""
    for name, layer in adapters(model):
        if isinstance(layer.rule, FakeQuantised):
            yield name, layer


def begin(model: nn.Module, step: int) -> None:
    """Whether training rounds after `step` optimiser steps."""
    for _, layer in rounding(model):
        layer.rule.begun = step >= layer.rule.config.fake_quant_after_n_steps
        return  # one rule for all


def weights_alone(model: nn.Module) -> None:
    """From here on, the stored weights in float32 and activations as they are, so that programs can be compared.

    An activation between two integers falls on either side with the last bit of a sum. Through thirty layers that
    shifted log-probabilities by 0.06 on average, the weights being the same to the bit (SmolLM2-135M).
    """
    for _, layer in rounding(model):
        layer.rule.kept_in = layer.rule.kept_in or innermost(layer).weight.dtype
        layer.rule.grid = replace(layer.rule.grid, activations=None)
    model.float()
