"""Partial fine-tuning: freeze the network but for the layers, kinds and names that were asked for."""

from typing import Any

from torch import nn

from ..errors import ModelError
from ..settings import nearest
from ..surgery import blocks, freeze, matches
from . import Partial


def apply(config: Partial, model: Any) -> None:
    freeze(model)
    names = {name for name, _ in model.named_parameters()}
    chosen: set[str] = set()
    for pattern in config.patterns:
        found = {name for name in names if any(matches(part, pattern) for part in _prefixes(name))}
        if not found:
            meant = nearest(pattern, {part for name in names for part in _prefixes(name)})
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise ModelError(f"trainable.patterns: {pattern!r} matches no parameter of the model{hint}")
        chosen |= found
    if config.last_layers:
        prefix, layers = blocks(model)
        if config.last_layers > len(layers):
            raise ModelError(f"trainable.last_layers={config.last_layers}, but the model has {len(layers)} layers")
        kept = [f"{prefix}.{i}." for i in range(len(layers) - config.last_layers, len(layers))]
        chosen |= {name for name in names if name.startswith(tuple(kept))}
    chosen |= _of_module(model, model.get_input_embeddings()) if config.embeddings else set()
    chosen |= _of_module(model, model.get_output_embeddings()) if config.head else set()
    if config.norms:
        chosen |= {
            f"{name}.{leaf}"
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            for leaf, _ in module.named_parameters(recurse=False)
        }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def _prefixes(name: str) -> list[str]:
    """The parameter's name and the names of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _of_module(model: nn.Module, wanted: nn.Module) -> set[str]:
    """Names, as `named_parameters` gives them, of a module's parameters, also where they are tied to another's."""
    inside = {id(p) for p in wanted.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside}
