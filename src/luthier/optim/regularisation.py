"""Dropout where a family has its own places for it, and where the Transformer paper has them in one that has none."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..surgery import blocks
from . import Regularisation

SUBLAYERS = ("attn", "attention", "mlp", "ffn", "feed_forward")
PROBABILITIES = ("attn_dropout", "attention_dropout")  # modules that drop attention's probabilities


def apply(config: Regularisation, model: Any) -> None:
    if config.dropout is not None:
        _residual(model, config.dropout)
    if config.attention_dropout is not None:
        _attention(model, config.attention_dropout)


def _residual(model: Any, rate: float) -> None:
    prefix, layers = blocks(model)
    for layer in layers:
        found = [m for n, m in layer.named_children() if any(part in n.lower() for part in SUBLAYERS) and not _norm(m)]
        if not found:
            raise ModelError(
                f"regularisation.dropout={rate}: the layers {prefix} of {type(model).__name__} have no attention or "
                "MLP that is known by its name"
            )
        for sublayer in found:
            _drop_output(sublayer, rate)
    outside = [m for n, m in model.named_modules() if isinstance(m, nn.Dropout) and not n.startswith(prefix + ".")]
    for module in outside:
        module.p = rate
    if not outside:
        _drop_output(model.get_input_embeddings(), rate)


def _norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _drop_output(module: Any, rate: float) -> None:
    """Set the module's own dropouts; where it has none, drop from what it returns while it is trained."""
    own = [m for n, m in module.named_modules() if isinstance(m, nn.Dropout) and n.split(".")[-1] not in PROBABILITIES]
    for dropout in own:
        dropout.p = rate
    if own:
        return

    def drop(module: nn.Module, _: Any, out: Any) -> Any:
        if not module.training:
            return out
        if isinstance(out, Tensor):
            return F.dropout(out, rate)
        return (F.dropout(out[0], rate), *out[1:])

    module.register_forward_hook(drop)


def _attention(model: Any, rate: float) -> None:
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and name.split(".")[-1] in PROBABILITIES:
            module.p = rate
            found += 1
        elif isinstance(getattr(module, "attention_dropout", None), float | int):
            module.attention_dropout = rate
            found += 1
    if not found:
        raise ModelError(
            f"regularisation.attention_dropout={rate}: {type(model).__name__} has no such dropout; use "
            "regularisation.dropout"
        )
