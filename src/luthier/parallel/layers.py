"""How the layers are computed: the same every time, with activations recomputed, compiled."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..errors import ModelError
from ..surgery import blocks
from . import Parallel


def choose_kernels(config: Parallel, device: torch.device) -> None:
    """Deterministic ones where wanted; a CPU's are. An operation that has none says so when it runs."""
    if device.type != "cuda":
        return
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(config.deterministic)


def checkpoint_activations(config: Parallel, model: Any) -> None:
    """Every n-th layer keeps its input only (arXiv:1604.06174)."""
    if not config.activation_checkpointing:
        return
    # transformers calls it activation checkpointing from 5.20 on
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"parallel.activation_checkpointing: {type(model).__name__} cannot: {error}") from None
    # transformers lets gradients flow into the embeddings for reentrant recomputation, which ours is not: with that,
    # frozen layers below the lowest that moves would be recomputed and walked for nothing.
    if hasattr(model, "_require_grads_hook"):  # set by some versions only
        model.disable_input_require_grads()
    layers: list[Any] = list(blocks(model)[1])
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i % config.activation_checkpointing == 0


def compiled(config: Parallel, device: torch.device) -> bool:
    return device.type == "cuda" if config.compile == "auto" else config.compile


def compile_layers(config: Parallel, model: Any, device: torch.device) -> None:
    """Each decoder layer and the last norm become graphs of fixed shapes; equal layers share their code."""
    if not compiled(config, device):
        return
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for layer in blocks(model)[1]:
        layer.compile(dynamic=False)
    for name, module in model.base_model.named_children():
        if "norm" in name or name == "ln_f":
            module.compile(dynamic=False)
