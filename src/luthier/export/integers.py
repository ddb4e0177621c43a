"""What a run trained for rounding, rounded: integers or float8 with their scales, as compressed-tensors reads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..assembled import Assembled
from ..config import Config
from ..errors import ExportError
from ..opened import Opened
from ..precision import QAT, converted
from . import plain


def check(source: str, config: Config, kind: str, dtype: str | None) -> None:
    """Whether a run was trained for it, and what reads it is there."""
    plain.check(source, config, kind, dtype)
    if not isinstance(config.precision, QAT):
        raise ExportError("as=quantised: the run was not trained for it; train with method=qat or method=qat-lora")
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ExportError(
            "a quantised model is checked by loading it with transformers and compressed-tensors: "
            "pip install luthier[export]; nothing was written"
        )


def write(found: Opened, out: Path, kind: str, dtype: str | None) -> dict:
    """Write into `out` and compare."""
    return plain.write(found, out, kind, dtype, rounded)


def rounded(made: Assembled, out: Path, base: str | None, dtype: torch.dtype | None = None) -> None:
    """The model with its quantised layers as integers, and how they were made in its configuration."""
    model: Any = made.network.model
    assert isinstance(made.config.precision, QAT)
    model.config.quantization_config = converted.quantization_config(made.config.precision, model)
    try:
        plain.write_model(made, out, converted.converted_state(model))
    finally:
        del model.config.quantization_config
