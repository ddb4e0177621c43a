"""Several LoRAs as one: their matrices side by side, so that the ranks add up and nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping
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


def write(weights: Mapping[Saved, float], folder: Path) -> dict[str, Any]:
    """The sum of LoRAs, each times its weight, as one of rank R in a folder.

    A [R, in] is theirs one below the other; B [out, R] theirs beside one another, each with its scaling and weight. A
    layer that one of them leaves alone has zeros there.
    """
    for one in weights:
        _check(one)
    _check_bases(list(weights))
    layers = sorted({layer for one in weights for layer in _layers(one)})
    ranks = {one: max(one.shapes[f"{layer}.{ENDS[0]}"][0] for layer in _layers(one)) for one in weights}
    tensors: dict[str, Tensor] = {}
    loaded = {one: load_file(one.tensors) for one in weights}
    for layer in layers:
        downs, ups = [], []
        shapes = [(one.shapes[f"{layer}.{ENDS[0]}"][1], one.shapes[f"{layer}.{ENDS[1]}"][0])
                  for one in weights if layer in _layers(one)]  # fmt: skip
        if len(set(shapes)) > 1:
            raise AdapterError(f"{layer} is {shapes[0]} in one adapter and {shapes[1]} in another: these are two bases")
        inputs, outputs = shapes[0]
        for one, weight in weights.items():
            down, up = torch.zeros(ranks[one], inputs), torch.zeros(outputs, ranks[one])
            if layer in _layers(one):
                a, b = (loaded[one][f"{layer}.{end}"].float() for end in ENDS)
                down[: len(a)], up[:, : len(a)] = a, b * (weight * _scaling(one, layer))
            downs.append(down)
            ups.append(up)
        tensors[f"{layer}.{ENDS[0]}"], tensors[f"{layer}.{ENDS[1]}"] = torch.cat(downs), torch.cat(ups, 1)
    rank = sum(ranks.values())
    settings = LoRA(r=rank, lora_alpha=rank, target_modules=[layer.removeprefix(PREFIX) for layer in layers])  # type: ignore[call-arg]
    first = next(iter(weights))
    about = {key: first.values.get(key) for key in ("base_model_name_or_path", "revision")}
    values = {**about, **settings.peft(), "target_modules": settings.target_modules,
              "fan_in_fan_out": first.values.get("fan_in_fan_out", False)}  # fmt: skip
    base = next((one.base for one in weights if one.base is not None), None)
    saved.write_files(folder, settings, tensors, values, base)
    return {"r": rank, "layers": len(layers), "parameters": sum(t.numel() for t in tensors.values())}


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


def _check_bases(found: list[Saved]) -> None:
    """The first two that are of different bases, by their fingerprints where they have one, else by their names."""
    for one in found[1:]:
        first = found[0]
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
