"""Find the layers that an adapter is asked to stand beside, and wrap them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ModelError
from ..settings import did_you_mean
from ..surgery import Adapter, blocks, freeze, heads, linear_shape, matches, outer, swap
from . import experts
from .adapter import OnLayers
from .selection import ROLES


def targets(config: OnLayers, model: Any) -> list[str]:
    """The names of the layers to adapt, in the model's order; words for groups mean linear layers but routers."""
    scoring = tuple(f"{name}." for name in heads(model)) or "\0"  # copies of heads move in full
    linear = [name for name, module in outer(model) if config.fits(module) and not f"{name}.".startswith(scoring)]
    prefix, _ = blocks(model)
    routing = experts.routers(model)
    inside = [
        name
        for name, module in outer(model)
        if name.startswith(prefix + ".") and linear_shape(module) and name not in routing
    ]
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    layers, weights = _layers(config, model), experts.names(model)
    chosen: set[str] = set()
    for pattern in wanted:
        if pattern == "all-linear":
            found = set(inside)
        elif pattern in ROLES:
            found = {n for n in inside if any(role in n.rpartition(".")[0].lower() for role in ROLES[pattern])}
        else:
            found = {n for n in linear if matches(n, pattern)}
        found = {n for n in found if in_layers(n, prefix, layers)}
        if of_experts := pattern in ("all-linear", "mlp"):
            _told_of_experts(config, weights)
        if not found and not (of_experts and weights):
            raise ModelError(_unmatched("target_modules", pattern, linear, {"all-linear", *ROLES}))
        chosen |= found
    for pattern in config.exclude_modules:
        left_out = {n for n in (*linear, *weights) if matches(n, pattern)}
        if not left_out:
            raise ModelError(_unmatched("exclude_modules", pattern, linear))
        chosen -= left_out
    if wanted and not chosen and not (weights and config.fits_experts):
        raise ModelError(
            f"trainable.exclude_modules={config.exclude_modules} leaves none of the layers of "
            f"trainable.target_modules={config.target_modules}: exclude less"
        )
    return [name for name in linear if name in chosen]


def _layers(config: OnLayers, model: Any) -> list[int] | None:
    """The layers of the network that it is kept to, of a kind that can be."""
    wanted, count = getattr(config, "layers_to_transform", None), len(blocks(model)[1])
    if wanted and not 0 <= min(wanted) <= max(wanted) < count:
        raise ModelError(f"trainable.layers_to_transform={wanted}: the model has layers 0 to {count - 1}")
    return wanted


def in_layers(name: str, prefix: str, layers: list[int] | None) -> bool:
    """Whether a module or parameter is inside one of these layers of the network."""
    return layers is None or name.startswith(tuple(f"{prefix}.{i}." for i in layers) or "\0")


def _told_of_experts(config: OnLayers, weights: list[str]) -> None:
    """A kind that has no rule for fused experts must not pass over the larger part of a model in silence."""
    left = [] if config.fits_experts else weights
    left = [n for n in left if not any(matches(n, pattern) for pattern in config.exclude_modules)]
    if left:
        kind = type(config).__name__
        raise ModelError(
            f"trainable.target_modules={config.target_modules}: the model keeps the weights of its experts as one "
            f"({left[0]}), which {kind} cannot adapt: use method=lora, target_modules=attention, or leave them out by "
            "exclude_modules=['*experts*']"
        )


def _unmatched(setting: str, pattern: str, linear: Iterable[str], also: Iterable[str] = ()) -> str:
    lasts = {n.rpartition(".")[2] for n in linear}
    meant = did_you_mean(pattern, lasts | set(also))
    return (
        f"trainable.{setting}: {pattern!r} matches no linear layer of the model{meant} "
        f"(it has {', '.join(sorted(lasts))})"
    )


def apply(config: OnLayers, model: nn.Module, adapter: str) -> None:
    """Freeze the model and wrap the layers that are asked for."""
    names = targets(config, model)
    freeze(model)
    wrap(config, model, names, adapter)


def wrap(config: OnLayers, model: nn.Module, names: Iterable[str], adapter: str) -> None:
    for name in names:
        layer = model.get_submodule(name)
        swap(model, name, Adapter(layer, config.rule(name, layer), adapter))
