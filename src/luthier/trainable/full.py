"""Full fine-tuning: every weight moves, but for those that are frozen by name."""

from torch import nn

from ..errors import ModelError
from . import Full
from .selection import named


def apply(config: Full, model: nn.Module) -> None:
    frozen = named(model, config.freeze, "trainable.freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"trainable.freeze={config.freeze} freezes every weight, so nothing would move: freeze less")
