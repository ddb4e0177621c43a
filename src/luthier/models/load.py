"""Load a causal language model and its tokenizer: hub name, folder or GGUF; safetensors only."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from . import Model, gguf
from .names import CHATML, conversion, problem


def load_tokenizer(model: Model) -> Any:
    """The tokenizer with the template that the run uses, and a token to pad with."""
    if model.name.endswith(".gguf"):
        tokenizer = gguf.read_tokenizer(Path(model.name).expanduser())
    else:
        from transformers import AutoTokenizer

        tokenizer = _explained(model, lambda: AutoTokenizer.from_pretrained(model.name, **_options(model)))
    if model.chat_template is not None:
        named = {"chatml": CHATML}.get(model.chat_template)
        inline = model.chat_template if "{" in model.chat_template else None
        tokenizer.chat_template = named or inline or Path(model.chat_template).expanduser().read_text()
    if isinstance(tokenizer.chat_template, dict):
        raise ModelError(
            f"model.name={model.name!r} has several chat templates ({', '.join(tokenizer.chat_template)}): "
            "save the one to use as a file and name it as model.chat_template"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: Model, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network with its weights in `dtype` on `device`, every tensor read, converted and placed one by one."""
    if text := problem(model):
        raise ModelError(f"model.name: {text}")
    if model.name.endswith(".gguf"):
        return gguf.read_model(Path(model.name).expanduser(), dtype).to(device)
    from transformers import AutoModelForCausalLM

    options = _options(model)
    if device.type != "cpu" and importlib.util.find_spec("accelerate"):
        options["device_map"] = {"": device}  # straight there; without accelerate, by way of the host's memory

    def read() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            model.name, dtype=dtype, use_safetensors=True, attn_implementation="sdpa", **options
        )

    return _explained(model, read).to(device)


def _options(model: Model) -> dict:
    return {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}


def _explained(model: Model, read: Any) -> Any:
    """Run a loader of transformers; its errors become ours, with the remedy."""
    try:
        return read()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            remedy = "it brings its own code; read it, then set model.trust_remote_code=true to run it"
        elif "safetensors" in text and not Path(model.name).exists():
            remedy = f"it has no safetensors; convert it once with\n    {conversion(model.name)}"
        elif os.environ.get("HF_HUB_OFFLINE") and not Path(model.name).expanduser().exists():
            remedy = "it is no folder here, and HF_HUB_OFFLINE keeps the hub away"
        else:
            remedy = "give a hub name, a folder or a .gguf file of a causal language model"
        raise ModelError(f"model.name={model.name!r} cannot be loaded: {remedy}\n({text.strip()[:600]})") from None
