"""Parameters by name, place and kind: what a selection comes to in a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ..errors import ModelError
from ..settings import did_you_mean
from ..surgery import blocks, heads, linear_shape, matches, outer
from . import Selection

ROLES = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward")}


def named(model: nn.Module, patterns: list[str], setting: str) -> set[str]:
    """The parameters that are, or are inside, what the patterns name; one that names nothing is an error."""
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if any(matches(part, pattern) for part in _prefixes(name))}
        if not found:
            meant = did_you_mean(pattern, {part for name in names for part in _prefixes(name)})
            raise ModelError(f"{setting}: {pattern!r} matches no parameter of the model{meant}")
        chosen |= found
    return chosen


def selected(model: Any, wanted: Selection, setting: str = "trainable") -> set[str]:
    """The names of all parameters that a selection asks for; `setting` is where it stands, for messages."""
    chosen = named(model, wanted.patterns, f"{setting}.patterns")
    if wanted.last_layers:
        chosen |= _last(model, wanted.last_layers, f"{setting}.last_layers")
    chosen |= _of_module(model, model.get_input_embeddings()) if wanted.embeddings else set()
    chosen |= _of_output(model) if wanted.head else set()
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    kinds = {
        "norms": norms,
        "biases": {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"},
        **{role: _role(model, role) - norms for role in ROLES},
    }
    for kind, names in kinds.items():
        if getattr(wanted, kind):
            if not names:
                raise ModelError(f"{setting}.{kind}: the model has no {kind}; leave it out")
            chosen |= names
    return chosen


def of_heads(model: Any) -> set[str]:
    """The parameters of the heads of a model that ends in scores, which always move."""
    scoring = tuple(f"{name}." for name in heads(model)) or "\0"
    return {name for name, _ in model.named_parameters() if name.startswith(scoring)}


def _of_output(model: Any) -> set[str]:
    output = model.get_output_embeddings()
    return of_heads(model) if output is None else _of_module(model, output)


def _last(model: Any, count: int, setting: str) -> set[str]:
    prefix, layers = blocks(model)
    if count > len(layers):
        raise ModelError(f"{setting}={count}, but the model has {len(layers)} layers")
    kept = tuple(f"{prefix}.{i}." for i in range(len(layers) - count, len(layers)))
    return {name for name, _ in model.named_parameters() if name.startswith(kept)}


def _role(model: Any, role: str) -> set[str]:
    """What is inside a module of this role in any layer."""
    prefix, _ = blocks(model)
    return {
        name
        for name, _ in model.named_parameters()
        if name.startswith(prefix + ".")
        and any(part in parent for parent in name.lower().split(".")[:-1] for part in ROLES[role])
        and not any("norm" in parent for parent in name.lower().split(".")[:-1])
    }


def _prefixes(name: str) -> list[str]:
    """The parameter's name and the names of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _of_module(model: nn.Module, wanted: nn.Module) -> set[str]:
    """Names, as `named_parameters` gives them, of a module's parameters, also where they are tied to another's."""
    inside = {id(p) for p in wanted.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside}


def ends_of_sublayers(model: Any, roles: Collection[str]) -> list[str]:
    """Where the attention or the feed-forward part of each layer is at its end: its last linear layer that gives the
    width of the stream, or, of experts, the part as a whole."""
    prefix, layers = blocks(model)
    width = model.config.get_text_config().hidden_size
    found = []
    for i, block in enumerate(layers):
        for role in roles:
            parts = [name for name, _ in block.named_children() if any(word in name.lower() for word in ROLES[role])]
            parts = [name for name in parts if "norm" not in name.lower()]
            if not parts and role == "mlp" and {"intermediate", "output"} <= dict(block.named_children()).keys():
                parts = ["output"]  # BERT's feed-forward part is its layer's own
            if not parts:
                raise ModelError(f"layer {i} of {type(model).__name__} has no {role} that is known by its name")
            part = block.get_submodule(parts[-1])
            ends = [name for name, module in outer(part) if name and (linear_shape(module) or (0, 0))[1] == width]
            experts = any("expert" in name for name, _ in part.named_children())
            found.append(f"{prefix}.{i}.{parts[-1]}" + (f".{ends[-1]}" if ends and not experts else ""))
    return found
