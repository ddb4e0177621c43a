"""Several LoRAs as one: their matrices side by side, so that the ranks add up and nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterError
from . import saved
from .adapter import PREFIX
from .adapter_files import Saved
from .lora import LoRA

ENDS = ("lora_A.weight", "lora_B.weight")


def checked(found: Sequence[Saved]) -> list[str]:
    """The layers that LoRAs of one base change, by their keys; AdapterError where they cannot be brought together."""
    for one in found:
        _check(one)
    _check_bases(list(found))
    layers = sorted({layer for one in found for layer in _layers(one)})
    for layer in layers:
        shapes = [_shape(one, layer) for one in found if layer in _layers(one)]
        if len(set(shapes)) > 1:
            raise AdapterError(f"{layer} is {shapes[0]} in one adapter and {shapes[1]} in another: these are two bases")
    return layers


def change(one: Saved, layer: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """[out, in] what a LoRA adds to the weight of a layer, scaling included; None where it leaves it alone."""
    if layer not in _layers(one):
        return None
    a, b = (tensors[f"{layer}.{end}"].float() for end in ENDS)
    return (b @ a) * _scaling(one, layer)


def write_factors(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], found: Sequence[Saved]) -> dict[str, Any]:
    """One LoRA of A [R, in] and B [out, R] of each layer, B A what it adds, that belongs where the first of those
    belongs that it was made from."""
    rank = max(len(a) for a, _ in factors.values())
    settings = LoRA(r=rank, lora_alpha=rank, target_modules=[layer.removeprefix(PREFIX) for layer in factors])  # type: ignore[call-arg]
    about = {key: found[0].values.get(key) for key in ("base_model_name_or_path", "revision")}
    values = {**about, **settings.peft(), "target_modules": settings.target_modules,
              "fan_in_fan_out": found[0].values.get("fan_in_fan_out", False)}  # fmt: skip
    tensors = {f"{layer}.{end}": t.contiguous() for layer, pair in factors.items() for end, t in zip(ENDS, pair)}
    base = next((one.base for one in found if one.base is not None), None)
    saved.write_files(folder, settings, tensors, values, base)
    return {"r": rank, "layers": len(factors), "parameters": sum(t.numel() for t in tensors.values())}


def write(weights: Mapping[Saved, float | Mapping[str, float]], folder: Path) -> dict[str, Any]:
    """The sum of LoRAs, each times its weight, in all layers or in each, as one of rank R in a folder.

    A [R, in] is theirs one below the other; B [out, R] theirs beside one another, each with its scaling and weight. A
    layer that one of them leaves alone has zeros there.
    """
    layers = checked(list(weights))
    ranks = {one: max(one.shapes[f"{layer}.{ENDS[0]}"][0] for layer in _layers(one)) for one in weights}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    loaded = {one: load_file(one.tensors) for one in weights}
    for layer in layers:
        downs, ups = [], []
        inputs, outputs = next(_shape(one, layer) for one in weights if layer in _layers(one))
        for one, given in weights.items():
            down, up = torch.zeros(ranks[one], inputs), torch.zeros(outputs, ranks[one])
            if layer in _layers(one):
                weight = given[layer] if isinstance(given, Mapping) else given
                a, b = (loaded[one][f"{layer}.{end}"].float() for end in ENDS)
                down[: len(a)], up[:, : len(a)] = a, b * (weight * _scaling(one, layer))
            downs.append(down)
            ups.append(up)
        factors[layer] = torch.cat(downs), torch.cat(ups, 1)
    return write_factors(folder, factors, list(weights))


def _shape(one: Saved, layer: str) -> tuple[int, int]:
    """(in, out) features."""
    return one.shapes[f"{layer}.{ENDS[0]}"][1], one.shapes[f"{layer}.{ENDS[1]}"][0]


def _layers(one: Saved) -> set[str]:
    return {key.removesuffix(f".{ENDS[0]}") for key in one.shapes if key.endswith(f".{ENDS[0]}")}


def _scaling(one: Saved, layer: str) -> float:
    return one.settings.scale(layer.removeprefix(PREFIX))[1]  # type: ignore[attr-defined]


def _check(one: Saved) -> None:
    if type(one.settings) is not LoRA:
        raise AdapterError(
            f"{one.path} is of kind {one.settings.kind}, and LoRAs alone can be laid side by side: load both and use "  # type: ignore[attr-defined]
            "luthier.adapters.combine"
        )
    if one.settings.target_parameters:
        raise AdapterError(
            f"{one.path} adapts fused expert weights, whose matrices lie otherwise: load both and use "
            "luthier.adapters.combine"
        )
    others = [key for key in one.shapes if not (key.startswith(PREFIX) and key.endswith(ENDS))]
    if others:
        raise AdapterError(f"{one.path} holds {others[0]}, which is no low-rank matrix and cannot be added up")


def _beneath(one: Saved) -> list:
    return list(one.base["beneath"]) if one.base else []


def _check_bases(found: list[Saved]) -> None:
    """The first two that are of different bases, by their fingerprints where they have one, else by their names."""
    for one in found[1:]:
        first = found[0]
        if _beneath(first) != _beneath(one):
            raise AdapterError(f"{first.path} and {one.path} were trained on top of different adapters")
        known = first.base is not None and one.base is not None
        if known and first.base["base"]["model_type"] != one.base["base"]["model_type"]:  # type: ignore[index]
            pass
        elif known:
            a, b = (of.base["base"]["tensors"] for of in (first, one))  # type: ignore[index]
            if all(a[name][2] == b[name][2] or a[name][0] != b[name][0] for name in a.keys() & b.keys()):
                continue
        else:
            a, b = (of.values.get("base_model_name_or_path") for of in (first, one))
            if a == b or not (a and b):
                continue
        names = [of.values.get("base_model_name_or_path") for of in (first, one)]
        raise AdapterError(f"{first.path} and {one.path} belong to different bases ({names[0]!r} and {names[1]!r})")
