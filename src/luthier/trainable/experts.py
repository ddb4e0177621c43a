"""Low-rank updates of fused expert weights: parameters [experts, out, in] of mixture-of-experts models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..surgery import Adapter, blocks, device_of, innermost, linear_shape, outer
from . import first_values


def fused(model: nn.Module) -> dict[str, list[str]]:
    """The modules inside the network's layers that hold the weights of all experts as one, and these weights' names."""
    prefix, _ = blocks(model)
    found = {}
    for name, module in outer(model):
        module = innermost(module)
        if not name.startswith(prefix + ".") or linear_shape(module) or isinstance(module, nn.modules.conv._ConvNd):
            continue
        weights = [leaf for leaf, p in module.named_parameters(recurse=False) if p.ndim == 3]
        if weights and "expert" in f"{name} {type(module).__name__}".lower():
            found[name] = weights
    return found


def names(model: nn.Module) -> list[str]:
    """The whole names of all fused expert weights."""
    return [f"{name}.{leaf}" for name, leaves in fused(model).items() for leaf in leaves]


def routers(model: nn.Module) -> set[str]:
    """Linear layers that choose among experts: beside these, with an output for each."""
    counts: dict[str, int] = {}
    for name, leaves in fused(model).items():
        counts[name.rpartition(".")[0]] = len(getattr(innermost(model.get_submodule(name)), leaves[0]))
    for name, module in outer(model):
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts":
            counts[name.rpartition(".")[0]] = len(module)
    return {
        name
        for name, module in outer(model)
        for block, count in counts.items()
        if name.startswith(block + ".") and ".experts." not in name and (linear_shape(module) or (0, 0))[1] == count
    }


class LowRankExperts:
    """W[e] + scaling * B[e] A[e] in the place of each expert's weight, for as long as the experts compute.

    `weights` gives the rank and the scaling of each parameter. A and B of all experts lie in two matrices in the order
    that PEFT reads (`target_parameters`): A [experts * r, in] and B [out, r * experts]. The sum is made anew in each
    pass, in the dtype of the weight; until the backward pass it takes as much memory as the experts' weights.
    """

    mergeable = True
    listed = "target_parameters"
    constants: ClassVar[tuple[str, ...]] = ()

    def __init__(self, weights: dict[str, tuple[int, float]], init: str = "kaiming", zero: str = "lora_B"):
        self.weights, self.init, self.zero = weights, init, zero

    def start(self, layer: Any) -> None:
        experts, device = innermost(layer), device_of(layer)
        layer.lora_A, layer.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, (r, _) in self.weights.items():
            count, outputs, inputs = getattr(experts, name).shape
            if getattr(experts, "is_transposed", False):
                inputs, outputs = outputs, inputs
            a = nn.Parameter(torch.empty(count * r, inputs, device=device))
            b = nn.Parameter(torch.empty(outputs, r * count, device=device))
            for one in range(count):  # each as if it were a layer by itself
                first_values.draw(a.detach()[one * r : (one + 1) * r], b.detach()[:, one::count], self.init, self.zero)
            layer.lora_A[name], layer.lora_B[name] = a, b

    def factors(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        """Left and right [experts, ., r] and [experts, r, .] of the change of a weight, as the weight lies."""
        experts, r = innermost(layer), self.weights[name][0]
        a, b = layer.lora_A[name], layer.lora_B[name]
        down = a.view(-1, r, a.shape[1])  # [experts, r, in]
        up = b.view(len(b), r, -1).permute(2, 0, 1)  # [experts, out, r]
        if getattr(experts, "is_transposed", False):
            return down.transpose(1, 2), up.transpose(1, 2)
        return up, down

    def forward(self, layer: Any, *inputs: Any, **more: Any) -> Any:
        experts, path, module = innermost(layer), "", layer.base
        while isinstance(module, Adapter):  # another adapter beneath finds the weight as it is changed here
            path, module = path + "base.", module.base
        changed = {}
        for name, (_, scaling) in self.weights.items():
            weight = getattr(experts, name)
            left, right = (factor.to(weight.dtype) for factor in self.factors(layer, name))
            changed[path + name] = torch.baddbmm(weight, left, right, alpha=scaling * layer.share)
        return functional_call(layer.base, changed, inputs, more)

    def merge(self, layer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        merged = dict(tensors)
        for name, (_, scaling) in self.weights.items():
            left, right = self.factors(layer, name)
            merged[name] = torch.baddbmm(tensors[name], left, right, alpha=scaling * layer.share)
        return merged

    def saved(self, layer: Any) -> dict[str, Tensor]:
        """PEFT wraps a module once for each of its parameters, the last one outermost."""
        names = list(self.weights)
        return {
            f"{'base_layer.' * (len(names) - 1 - i)}lora_{side}.weight": getattr(layer, f"lora_{side}")[name]
            for i, name in enumerate(names)
            for side in ("A", "B")
        }
