"""Structured pruning in depth: the layers that do least go, the others keep their order."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...errors import ModelError
from .families import Sizes
from .importance import Documents, influences, perplexities
from .settings import Pruning


def kept(importance: Tensor, count: int) -> list[int]:
    """The `count` layers of largest importance [L], in their order; of equal ones the earlier stay."""
    order = sorted(range(len(importance)), key=lambda i: (-importance[i].item(), i))
    return sorted(order[:count])


def count(wanted: Pruning, layers: int) -> int:
    """How many layers stay: the number of `shape`, or nearest to `target`; at least one stays, and one goes."""
    if wanted.shape:
        left = wanted.shape["num_hidden_layers"]
        if left >= layers:
            raise ModelError(f"--shape num_hidden_layers={left}: the model has {layers} layers, so none would go")
        return left
    assert wanted.target is not None, "checked with the settings"
    if layers < 2:
        raise ModelError("--by depth: the model has one layer only")
    return min(max(1, round(wanted.target * layers)), layers - 1)


def chosen(model: Any, documents: Documents, wanted: Pruning) -> tuple[list[int], Tensor]:
    """The layers that stay, and the importance [L] of all."""
    measure = influences if wanted.importance == "block_influence" else perplexities
    importance = measure(model, documents)
    return kept(importance, count(wanted, Sizes.of(model.config).layers)), importance


def without(config: Any, state: dict[str, Tensor], layers: Sequence[int]) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the tensors of these layers alone, counted anew."""
    made = copy.deepcopy(config)
    before = config.num_hidden_layers
    made.num_hidden_layers = len(layers)
    for name, value in vars(config).items():  # such as layer_types
        if isinstance(value, list) and len(value) == before and name != "architectures":
            setattr(made, name, [value[i] for i in layers])
    numbers = {old: new for new, old in enumerate(layers)}
    out = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*\blayers\.)(\d+)(\..*)", name)
        if found is None:
            out[name] = tensor
        elif int(found[2]) in numbers:
            out[f"{found[1]}{numbers[int(found[2])]}{found[3]}"] = tensor
    return made, out
