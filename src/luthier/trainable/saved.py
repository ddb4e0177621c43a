"""Adapter folders in PEFT's layout: written whole, read strictly, for every kind of adapter."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from .adapter import Adapting

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write(
    folder: Path, model: nn.Module, settings: Adapting, name: str = "default", base: str | None = None,
    revision: str | None = None,
) -> None:  # fmt: skip
    """The adapter of this name into a folder; `base` is where other tools find the model that it belongs to."""
    tensors = {key: t.detach().contiguous().cpu() for key, t in settings.saved(model, name).items()}
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    written = {
        "peft_type": settings.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        **settings.peft(),
        **settings.placed(model, name),
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(written, indent=2))
