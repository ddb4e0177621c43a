"""The fingerprint of a base model: a few values of each tensor, so that an adapter for another one is noticed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..surgery import Adapter, QuantisedLinear, Switched, base_name, dense, heads, transposed

VALUES = 4  # of each tensor
QUANTISED = "quantised"
ROUNDING = 2**-7  # relative, between two floating-point formats of at least 8 bits of mantissa
DISTANCE = 0.3  # relative, of all sampled values together, where one side is kept in fewer bits: NF4 differs by 0.1


def take(model: Any) -> dict[str, Any]:
    """The family, and of each tensor of the base: how it is kept, its shape, and a few of its values."""
    tensors = {name: (kept, list(t.shape), _values(t, t.shape)) for name, kept, t in unadapted(model)}
    return {"model_type": model.config.model_type, "tensors": tensors}


@torch.no_grad()
def difference(model: Any, recorded: Mapping[str, Any]) -> str | None:
    """What tells that a model is not the one of a fingerprint: both sides by name; None if it is the same."""
    there, here = recorded["model_type"], model.config.model_type
    if there != here:
        return f"its base is of the family {there!r}, this model of {here!r}"
    wanted, words, compared = recorded["tensors"], _words(model), 0
    rough: list[tuple[list[float], list[float]]] = []
    for name, kept, tensor in unadapted(model):
        if name not in wanted:
            continue
        compared += 1
        kept_there, shape, values = wanted[name]
        if not _fits(shape, list(tensor.shape), more_rows=name in words):
            return f"{name} has shape {shape} in its base and {list(tensor.shape)} in this model"
        ours = _values(tensor, shape)
        if QUANTISED in (kept, kept_there):
            rough.append((values, ours))
        elif not _same(values, ours, exactly=kept == kept_there):
            return f"{name} holds other values in its base ({_few(values)}) than in this model ({_few(ours)})"
    if not compared:
        return f"its base has no tensor of a name that this model has (there {next(iter(wanted), 'none')!r})"
    if rough:
        a, b = (np.array([x for side in rough for x in side[i]]) for i in (0, 1))
        apart = np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-12)
        if apart > DISTANCE:
            return f"the weights that are kept in fewer bits differ by {apart:.0%} from those of its base"
    return None


def unadapted(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(name, how it is kept, tensor) of what a model has without its adapters; tied ones once, weights as [out, in].

    Without heads that give scores: those of a base are drawn, and an adapter brings its own.
    """
    scoring = tuple(f"{name}." for name in heads(model))
    return (found for found in _below(model, "", set()) if not found[0].startswith(scoring or "\0"))


def _below(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, str, Tensor]]:
    if isinstance(module, Adapter):
        yield from _below(module.base, name, seen)
        return
    if isinstance(module, Switched) or id(module) in seen:
        return
    seen.add(id(module))
    prefix = f"{name}." if name else ""
    if isinstance(module, QuantisedLinear):
        for leaf, tensor in dense(module).items():
            yield prefix + leaf, QUANTISED if leaf == "weight" else str(module.dtype), tensor
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            turned = transposed(module) and parameter.ndim == 2
            yield prefix + leaf, str(parameter.dtype), parameter.detach().t() if turned else parameter.detach()
    for child, below in module.named_children():
        yield from _below(below, prefix + child, seen)


def _values(tensor: Tensor, shape: Any) -> list[float]:
    """Values at places that follow from the shape alone, so that further rows change none of them."""
    count = int(np.prod(shape))
    flat = [(k * 2654435761 + 40503) % count for k in range(1, VALUES + 1)]
    places = tuple(torch.as_tensor(index, device=tensor.device) for index in np.unravel_index(flat, tuple(shape)))
    return tensor[places].float().tolist()


def _words(model: Any) -> set[str]:
    """The tensors that have a row for each token: a vocabulary that was made longer is the same base."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    inside = {id(p) for m in modules if m is not None for p in m.parameters()}
    return {base_name(name) for name, parameter in model.named_parameters() if id(parameter) in inside}


def _fits(there: list[int], here: list[int], more_rows: bool) -> bool:
    if more_rows and there and here:
        return here[0] >= there[0] and here[1:] == there[1:]
    return there == here


def _same(there: list[float], here: list[float], exactly: bool) -> bool:
    if exactly:
        return there == here
    return all(abs(a - b) <= ROUNDING * max(abs(a), abs(b)) + 1e-6 for a, b in zip(there, here))


def _few(values: list[float]) -> str:
    return ", ".join(f"{v:.4g}" for v in values[:3])
