"""Find the layers that an adapter is asked to stand beside, and wrap them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ModelError
from ..settings import nearest
from ..surgery import Adapter, blocks, freeze, linear_shape, matches, outer, swap
from .adapter import OnLayers
from .selection import ROLES


def targets(config: OnLayers, model: Any) -> list[str]:
    """The names of the linear layers to adapt, in the model's order."""
    linear = [name for name, module in outer(model) if linear_shape(module)]
    prefix, _ = blocks(model)
    inside = [name for name in linear if name.startswith(prefix + ".")]
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    chosen: set[str] = set()
    for pattern in wanted:
        if pattern == "all-linear":
            found = set(inside)
        elif pattern in ROLES:
            found = {n for n in inside if any(role in n.rpartition(".")[0].lower() for role in ROLES[pattern])}
        else:
            found = {n for n in linear if matches(n, pattern)}
        if not found:
            raise ModelError(_unmatched("target_modules", pattern, linear, {"all-linear", *ROLES}))
        chosen |= found
    for pattern in config.exclude_modules:
        left_out = {n for n in linear if matches(n, pattern)}
        if not left_out:
            raise ModelError(_unmatched("exclude_modules", pattern, linear))
        chosen -= left_out
    if not chosen:
        raise ModelError(
            f"trainable.exclude_modules={config.exclude_modules} leaves none of the layers of "
            f"trainable.target_modules={config.target_modules}: exclude less"
        )
    return [name for name in linear if name in chosen]


def _unmatched(setting: str, pattern: str, linear: Iterable[str], also: Iterable[str] = ()) -> str:
    lasts = {n.rpartition(".")[2] for n in linear}
    meant = nearest(pattern, lasts | set(also))
    hint = f"; did you mean {meant!r}?" if meant else ""
    return (
        f"trainable.{setting}: {pattern!r} matches no linear layer of the model{hint} "
        f"(it has {', '.join(sorted(lasts))})"
    )


def apply(config: OnLayers, model: nn.Module, adapter: str) -> None:
    """Freeze the model and wrap the layers that are asked for."""
    names = targets(config, model)
    freeze(model)
    for name in names:
        layer = model.get_submodule(name)
        swap(model, name, Adapter(layer, config.rule(name, layer), adapter))
