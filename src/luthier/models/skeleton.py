"""A network without its weights: built on the meta device from its configuration alone, to be reckoned with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from . import Model, gguf, start
from .heads import TOKENS, Ending, attending
from .load import explained, load_tokenizer, options
from .names import TRAIN, problem


class _Vocabulary:
    """As much of a tokenizer that is yet to be trained as a configuration is made from."""

    def __init__(self, size: int):
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {"": self.size - 1}


def outline(model: Model, dtype: torch.dtype, context: int, ending: Ending = TOKENS) -> Any:
    """The network as it would be loaded, with shapes and dtypes but no values; of a GGUF file only the head is read."""
    if model.name and (text := problem(model, weights=False)):
        raise ModelError(f"model.name: {text}")

    def build() -> Any:
        from transformers import AutoConfig

        if model.starts_at_random:
            known = model.tokenizer != TRAIN
            config = start.configuration(
                model, load_tokenizer(model) if known else _Vocabulary(model.vocab_size or 0), context
            )
        elif model.name.endswith(".gguf"):
            config = gguf.read_config(Path(model.name).expanduser(), dtype)
        else:
            config = AutoConfig.from_pretrained(model.name, **options(model))
            vars(config).pop("quantization_config", None)  # its layers are made anew
        ending.name_in(config)
        extra = {"trust_remote_code": True} if model.trust_remote_code else {}
        with torch.device("meta"):
            return attending(lambda **kind: ending.auto.from_config(config, dtype=dtype, **kind, **extra))

    made = explained(model, build)
    made.tie_weights()
    return made
