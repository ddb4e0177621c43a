"""Safetensors as torchao flattens its tensors, and transformers with it reads them: 8-bit weights.

Its 4-bit tensors are packed for kernels of GPUs, or kept one to a byte, so there is nothing of 4 bits to write here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .... import surgery
from ..layers import Rounded
from ..schemes import Quantising

WIDE = False  # it multiplies in the numbers that its file names


def lacking() -> str | None:
    """What has to be installed to load it again."""
    return None if find_spec("torchao") else "pip install 'luthier[quant]' (torchao)"


def _kept(layer: Rounded) -> Any:
    from torchao.quantization import Int8Tensor

    zero = torch.zeros(layer.grid.scale.shape, dtype=torch.int8)
    return Int8Tensor(layer.codes, layer.grid.scale.float(), [1, layer.codes.shape[1]], layer.grid.scale.dtype, zero)


def tensors(layer: Rounded, wanted: Quantising) -> dict[str, Tensor]:
    """The tensors in the place of `weight`, by the ends of their names."""
    parts, _ = _flat({"layer.weight": _kept(layer)})
    return {name.removeprefix("layer."): tensor for name, tensor in parts.items()}


def _flat(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    return flatten_tensor_state_dict(state)


def configuration(model: Any, layers: Mapping[str, Rounded], wanted: Quantising) -> dict:
    """Of config.json."""
    from torchao.core.config import config_to_dict
    from torchao.quantization import Int8WeightOnlyConfig

    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and surgery.linear_shape(m)} - set(layers)
    return {
        "quant_method": "torchao", "quant_type": {"default": config_to_dict(Int8WeightOnlyConfig(version=2))},
        "modules_to_not_convert": sorted(plain), "include_input_output_embeddings": False,
    }  # fmt: skip


def finish(folder: Path, layers: Mapping[str, Rounded]) -> None:
    """What torchao says of its tensors into the head of each file that has some."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys, head = file.keys(), file.metadata() or {}
            parts = {key: file.get_tensor(key) for key in keys}
        whole = [key for key in parts if "._weight_" not in key]
        own = [name for name in layers if f"{name}._weight_qdata" in parts]
        told = {key: json.dumps({"_type": "Tensor"}) for key in whole}
        for name in own:
            told |= {k: v for k, v in _flat({f"{name}.weight": _kept(layers[name])})[1].items() if k != "tensor_names"}
        names = json.dumps([*whole, *(f"{name}.weight" for name in own)])
        save_file(parts, path, metadata=head | told | {"tensor_names": names})
