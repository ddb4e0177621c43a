"""Safetensors as bitsandbytes keeps 4-bit layers, and transformers with it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from .... import surgery
from ..rounding.nf4 import Blocks
from ..schemes import Quantising

WIDE = False  # it multiplies in the numbers that its file names


def lacking() -> str | None:
    """What has to be installed to make it and to load it again."""
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    return f"pip install 'luthier[quant]' ({', '.join(missing)})" if missing else None


def tensors(layer: Blocks, wanted: Quantising) -> dict[str, Tensor]:
    """The tensors of a layer, by the ends of their names."""
    return {"weight": layer.codes} | {f"weight.{k}": v for k, v in layer.state.as_dict(packed=True).items()}


def configuration(model: Any, layers: Mapping[str, Blocks], wanted: Quantising) -> dict:
    """Of config.json."""
    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and surgery.linear_shape(m)} - set(layers)
    dtype = str(next(iter(layers.values())).state.dtype).removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(plain),
    }  # fmt: skip
