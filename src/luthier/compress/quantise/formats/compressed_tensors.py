"""Safetensors as compressed-tensors, and vLLM with it, read them.

Without zero points: its release 0.20 cannot read packed ones through transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .... import surgery
from ....precision.converted import described, layers_of
from ....precision.rounding import pack
from ..layers import Rounded
from ..schemes import Quantising

WIDE = True  # whether what is loaded can be compared in float32: codes and scales are all there is


def lacking() -> str | None:
    """What has to be installed to load it again."""
    return None if find_spec("compressed_tensors") else "pip install 'luthier[export]' (compressed-tensors)"


def tensors(layer: Rounded, wanted: Quantising) -> dict[str, Tensor]:
    """The tensors in the place of `weight`, by the ends of their names."""
    scale = layer.grid.scale[:1, 0] if wanted.per_tensor else layer.grid.scale
    if wanted.kind.activations is not None:
        return {"weight": layer.codes, "weight_scale": scale.contiguous()}
    packed = pack(layer.codes, layer.bits)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(layer.codes.shape)}


def configuration(model: Any, layers: Mapping[str, Rounded], wanted: Quantising) -> dict:
    """Of config.json; layers that differ in bits are told by name."""
    kind = wanted.kind
    layout = "pack-quantized" if kind.activations is None else f"{kind.numbers}-quantized"
    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and surgery.linear_shape(m)} - set(layers)
    ways: dict[tuple[int, int], list[str]] = {}
    for name, layer in layers.items():
        ways.setdefault((layer.bits, layer.group), []).append(name)
    groups = []
    for (bits, group), named in sorted(ways.items()):
        groups.append(
            layers_of(
                layout, bits, "float" if kind.numbers == "float" else "int", group, kind.activations,
                per_tensor=wanted.per_tensor,
                targets=["Linear"] if len(ways) == 1 else sorted(named),
            )
        )  # fmt: skip
    return described(groups, plain)
