"""Full fine-tuning: every weight moves."""

from torch import nn

from . import Full


def apply(config: Full, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
