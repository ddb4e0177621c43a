"""Partial fine-tuning: freeze the network but for layers, kinds and names that were asked for, or from a step on."""

from typing import Any

from ..errors import ModelError
from . import Partial
from .selection import named, of_heads, selected


def apply(config: Partial, model: Any) -> None:
    """What moves from the first step on requires gradients; what begins later is in `begins`."""
    first = (selected(model, config) | of_heads(model)) - named(model, config.freeze, "trainable.freeze")
    if not first:
        raise ModelError(
            "trainable: nothing would move in the first step: "
            f"trainable.freeze={config.freeze} takes back all that was named; name more, or freeze less"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in first)


def begins(config: Partial, model: Any) -> dict[str, int]:
    """Each parameter that begins to move later, and the number of optimiser steps that are taken before."""
    frozen = named(model, config.freeze, "trainable.freeze")
    moving = (selected(model, config) | of_heads(model)) - frozen
    late: dict[str, int] = {}
    for i, entry in enumerate(config.unfreeze):
        setting = f"trainable.unfreeze[{i}]"
        further = selected(model, entry, setting) - frozen - moving
        if not further:
            raise ModelError(f"{setting}: nothing further would move at step {entry.step}; name more, or leave it out")
        moving |= further
        late |= dict.fromkeys(further, entry.step)
    return {name: late[name] for name, _ in model.named_parameters() if name in late}
