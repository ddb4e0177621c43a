"""Load a causal language model and its tokenizer: hub name, folder or GGUF; safetensors only."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from . import Model, gguf, vocabulary
from .names import CHATML, TRAIN, conversion, problem, resaving


def load_tokenizer(model: Model, trained: Path | None = None) -> Any:
    """The tokenizer with the run's template and new tokens, and one to pad with; `trained`: where a trained one is."""
    tokenizer = _read_tokenizer(model, trained)
    vocabulary.add(tokenizer, model)
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


def _read_tokenizer(model: Model, trained: Path | None) -> Any:
    if model.tokenizer == TRAIN:
        from transformers import PreTrainedTokenizerFast

        assert trained is not None, "a trained tokenizer is made before it is loaded"
        return PreTrainedTokenizerFast.from_pretrained(trained)
    name = model.tokenizer or model.name
    if name.endswith(".gguf"):
        return gguf.read_tokenizer(Path(name).expanduser())
    from transformers import AutoTokenizer

    own = options(model) if model.tokenizer is None else {"trust_remote_code": model.trust_remote_code}
    named = model if model.tokenizer is None else model.model_copy(update={"name": name})
    return explained(named, lambda: AutoTokenizer.from_pretrained(name, **own))


def load_model(model: Model, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network with its weights in `dtype` on `device`, every tensor read, converted and placed one by one."""
    if text := problem(model):
        raise ModelError(f"model.name: {text}")
    if model.name.endswith(".gguf"):
        return gguf.read_model(Path(model.name).expanduser(), dtype).to(device)
    from transformers import AutoConfig, AutoModelForCausalLM

    given: dict[str, Any] = options(model)
    config = explained(model, lambda: AutoConfig.from_pretrained(model.name, **given))
    if config.is_encoder_decoder:
        raise ModelError(
            f"model.name={model.name!r} is an encoder with a decoder ({config.model_type}), no causal language model"
        )
    if device.type != "cpu" and importlib.util.find_spec("accelerate"):
        given["device_map"] = {"": device}  # straight there; without accelerate, by way of the host's memory

    def read() -> tuple[nn.Module, dict]:
        return AutoModelForCausalLM.from_pretrained(
            model.name, dtype=dtype, use_safetensors=True, attn_implementation="sdpa", output_loading_info=True, **given
        )

    made, info = explained(model, read)
    _check_keys(model, made, info)
    return made.to(device)


def _check_keys(model: Model, made: Any, info: dict) -> None:
    """Where a file and the network differ in their tensors, transformers only warns, and draws what is missing."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    told = []
    if missing:
        told.append(f"lacks {len(missing)} tensors that a {type(made).__name__} has ({', '.join(missing[:5])})")
    if unexpected:
        told.append(f"has {len(unexpected)} tensors that a {type(made).__name__} has not ({', '.join(unexpected[:5])})")
    if told:
        remedy = (
            "its weights would start at random: give the whole model"
            if missing
            else "they would be lost; if that is meant, load and save it once with\n    " + resaving(model.name)
        )
        raise ModelError(f"model.name={model.name!r} {' and '.join(told)}: {remedy}")


def check_context(model: Any, max_length: int, tell: Callable[[str], None]) -> None:
    """Documents longer than the positions that the model knows: learnt ones do not exist, rotary ones are new to it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit >= max_length:
        return
    words = model.get_input_embeddings()
    learnt = any(
        isinstance(module, nn.Embedding) and module is not words and ("position" in name or "wpe" in name)
        for name, module in model.named_modules()
    )
    what = f"data.max_length={max_length}, but {type(model).__name__} has {limit} positions"
    if learnt:
        raise ModelError(f"{what}: use data.max_length={limit}")
    tell(f"{what}: what stands after those is new to it; use data.max_length={limit}, or a rope_scaling")


def check_virtual(model: Any, max_length: int, count: int) -> None:
    """Virtual tokens take positions of the context, before those of a document."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not count or not isinstance(limit, int) or count + max_length <= limit:
        return
    remedy = f"data.max_length={limit - count}" if count < limit else f"fewer than {limit} virtual tokens"
    raise ModelError(
        f"trainable.num_virtual_tokens={count} and data.max_length={max_length} take {count + max_length} positions, but "
        f"{type(model).__name__} has {limit}: use {remedy}"
    )


def options(model: Model) -> dict:
    return {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}


def explained(model: Model, read: Any) -> Any:
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
