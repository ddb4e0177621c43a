"""Modules that are trained in full beside an adapter: a copy moves, and the module itself stays as it is."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ModelError
from ..settings import did_you_mean
from ..surgery import Adapter, QuantisedLinear, base_name, dense, heads, matches, outer, swap


class TrainedCopy:
    """A copy of the base, in the base's place; PEFT's `modules_to_save`."""

    mergeable = True
    listed = "modules_to_save"
    constants: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tied_to: Adapter | None = None):
        self.tied_to = tied_to

    def start(self, layer: Any) -> None:
        layer.trained = _plain_copy(layer.base)
        if self.tied_to is not None:
            layer.trained.weight = self.tied_to.trained.weight  # type: ignore[union-attr]
        for parameter in layer.trained.parameters():
            parameter.requires_grad_(True)

    def forward(self, layer: Any, *inputs: Any, **more: Any) -> Any:
        if layer.share == 1.0:
            return layer.trained(*inputs, **more)
        between = _between(dense(layer.base), dense(layer.trained), layer.share)
        own = {name: between[name].to(t.dtype) for name, t in layer.trained.named_parameters()}
        return functional_call(layer.trained, own, inputs, more)

    def stand_in(self, layer: Any) -> nn.Module | None:
        return layer.trained if layer.share == 1.0 else None

    def merge(self, layer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return _between(tensors, dense(layer.trained), layer.share)

    def saved(self, layer: Any) -> dict[str, Tensor]:
        return layer.trained.state_dict(keep_vars=True)


def _between(base: dict[str, Tensor], trained: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    if share == 1.0:
        return base | trained
    return base | {name: base[name] + share * (t - base[name]) for name, t in trained.items()}


def _plain_copy(module: nn.Module) -> nn.Module:
    """In the numbers that it computes in: a layer that is kept in fewer bits becomes a plain one."""
    if isinstance(module, QuantisedLinear):
        dtype, weight = module.dtype, module.dequantize(module.dtype)
        made = nn.Linear(
            module.in_features, module.out_features, module.bias is not None, device=weight.device, dtype=dtype
        )
        with torch.no_grad():
            made.weight.copy_(weight)
            if module.bias is not None:
                made.bias.copy_(module.bias)
        return made
    return copy.deepcopy(module)


def chosen(model: nn.Module, patterns: list[str]) -> list[str]:
    """The names of the modules to train in full, each pattern with at least one; no module inside another."""
    names = [n for n, m in outer(model) if n and (isinstance(m, QuantisedLinear) or any(True for _ in m.parameters()))]
    found: set[str] = set()
    for pattern in patterns:
        mine = {name for name in names if matches(name, pattern)}
        if not mine:
            meant = did_you_mean(pattern, {name.rpartition(".")[2] for name in names})
            raise ModelError(f"trainable.modules_to_save: {pattern!r} matches no module of the model{meant}")
        found |= mine
    return [name for name in names if name in found and not any(name.startswith(other + ".") for other in found)]


def add_heads(model: Any, adapter: str) -> None:
    """Copies of the heads of a model that ends in scores, unless they have some: a new head has to be learnt.

    PEFT does the same for its task types SEQ_CLS and TOKEN_CLS.
    """
    names = [n for n in heads(model) if not _covered(model.get_submodule(n), adapter)]
    apply(model, names, adapter)


def _covered(module: nn.Module, adapter: str) -> bool:
    return any(isinstance(m, Adapter) and m.name == adapter for m in module.modules())


def of_heads(model: Any, adapter: str) -> dict[str, Tensor]:
    """The tensors of these copies, under the names of their modules."""
    found = {place: model.get_submodule(place) for place in heads(model)}
    return {
        f"{base_name(place)}.{leaf}": tensor
        for place, module in found.items()
        if isinstance(module, Adapter) and module.name == adapter
        for leaf, tensor in module.rule.saved(module).items()
    }


def names_of_heads(model: Any, adapter: str) -> list[str]:
    """The last parts of these modules' names, as PEFT lists what is saved."""
    return sorted({key.rpartition(".")[2] for key in heads(model) if _covered(model.get_submodule(key), adapter)})


def apply(model: nn.Module, names: list[str], adapter: str) -> None:
    for name in names:
        module = model.get_submodule(name)
        inside = [m for m in module.modules() if m is not module]
        if any(isinstance(m, QuantisedLinear) for m in inside):
            raise ModelError(
                f"trainable.modules_to_save: {name} holds layers in fewer bits, which cannot move: name these layers, "
                "of which copies in full are made, or use precision.kind=as_loaded"
            )
        if any(isinstance(inner, Adapter) for inner in module.modules()):
            raise ModelError(
                f"trainable.modules_to_save: {name} is adapted already, by another adapter or by target_modules: leave "
                "it out of one of them"
            )
        swap(model, name, Adapter(module, TrainedCopy(), adapter))
