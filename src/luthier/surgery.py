"""Operations on a network's modules: freeze, match by name, swap, adapters and switching them off."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that move, by name, each once although it may be tied."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def matches(name: str, pattern: str) -> bool:
    """`pattern` is a whole dotted name, its end, a glob (`*.mlp.*`), or a regular expression after `re:`."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(in, out) features of a linear layer, plain, quantised or GPT-2's transposed Conv1D; None of anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module.weight.shape[0], module.nf
    return None


def transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def roles(model: Any) -> dict[str, str]:
    """Parameter -> `embedding`, `head` (also where that is tied to an embedding) or `transposed`; no other is named."""
    found = {}
    head = model.get_output_embeddings()
    for module in model.modules():
        embeds = isinstance(module, nn.Embedding) or module is model.get_input_embeddings()
        if embeds or transposed(module):
            found |= dict.fromkeys(map(id, module.parameters()), "embedding" if embeds else "transposed")
    found |= dict.fromkeys(map(id, head.parameters() if head is not None else ()), "head")
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the network's layers and its name: the longest `ModuleList` whose members are of one class."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of layers")
    return max(found, key=lambda item: (sum(p.numel() for p in item[1].parameters()), len(item[1])))


class Adapter(nn.Module):
    """What wraps a layer `base` and adds to its output; with `enabled` False it is the layer."""

    base: Any
    enabled: bool = True

    def delta(self) -> Tensor:
        """What merging adds to the base's weight, in that weight's layout, float32."""
        raise NotImplementedError


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield name, module


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters."""
    found = [module for _, module in adapters(model)]
    before = [module.enabled for module in found]
    try:
        for module in found:
            module.enabled = False
        yield
    finally:
        for module, state in zip(found, before):
            module.enabled = state


@contextmanager
def replaced(named: Mapping[str, Tensor], values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Other values in named tensors for a while; None leaves them alone."""
    if values is None:
        yield
        return
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(values[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in named.items():
                tensor.copy_(before[name])


def base_name(name: str) -> str:
    """The name that a parameter had before adapters wrapped its layer."""
    return name.replace(".base.", ".")


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the network with its adapters merged into copies; the live weights stay as they are."""
    inside = dict(adapters(model))
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = next((a for a in _owners(name) if a in inside), None)
        if owner is None:
            state[name] = tensor.detach()
        elif name.startswith(f"{owner}.base."):
            merged = tensor.detach()
            if name == f"{owner}.base.weight":
                merged = (merged.float() + inside[owner].delta().to(merged.device)).to(merged.dtype)
            state[base_name(name)] = merged
    return state


def _owners(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(len(parts), 0, -1))
