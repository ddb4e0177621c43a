"""A network without its weights: built on the meta device from its configuration alone, to be reckoned with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from . import Model, gguf
from .load import _explained, _options
from .names import problem


def outline(model: Model, dtype: torch.dtype) -> Any:
    """The network as it would be loaded, with shapes and dtypes but no values; of a GGUF file only the head is read."""
    if text := problem(model, weights=False):
        raise ModelError(f"model.name: {text}")

    def build() -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        if model.name.endswith(".gguf"):
            config = gguf.read_config(Path(model.name).expanduser(), dtype)
        else:
            config = AutoConfig.from_pretrained(model.name, **_options(model))
        extra = {"trust_remote_code": True} if model.trust_remote_code else {}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", **extra)

    made = _explained(model, build)
    made.tie_weights()
    return made
