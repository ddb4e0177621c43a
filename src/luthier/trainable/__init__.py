"""Steps 3 and 4, trainable: which parameters move, and how; a class for each answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..settings import Settings
from .bottleneck import Bottleneck
from .dora import DoRA
from .ia3 import IA3
from .lora import LoRA
from .p_tuning import PTuning
from .prefix import Prefix
from .prompt import Prompt

if TYPE_CHECKING:
    from torch import nn


class Full(Settings):
    """Every weight moves."""

    kind: Literal["full"] = "full"
    freeze: list[str] = []
    """But not these: names or patterns, as in partial's `patterns`."""

    def apply(self, model: nn.Module) -> None:
        from . import full

        full.apply(self, model)


class Selection(Settings):
    """Parameters by name, place and kind; what is asked for in several ways is added up."""

    patterns: list[str] = []
    """Names of parameters or modules: whole, their ends, globs (`*.mlp.*`), or `re:` and a regular expression."""
    last_layers: int = Field(0, ge=0)
    """The last so many layers of the network."""
    embeddings: bool = False
    norms: bool = False
    """All norms, in every layer and after the last."""
    head: bool = False
    """The output layer; where it is tied to the embeddings, both move."""
    biases: bool = False
    """All biases (BitFit, arXiv:2106.10199), those of norms included."""
    attention: bool = False
    """The attention of every layer, without its norms."""
    mlp: bool = False
    """The feed-forward part of every layer, without its norms."""

    @property
    def empty(self) -> bool:
        return not any(getattr(self, name) for name in Selection.model_fields)


class Unfreeze(Selection):
    """What further moves from a step on."""

    step: int = Field(ge=1)
    """Optimiser steps that are taken before it moves."""


class Partial(Selection):
    """Layer freezing: what is named moves, all else is frozen."""

    kind: Literal["partial"] = "partial"
    freeze: list[str] = []
    """Names or patterns of what stays frozen all the same."""
    unfreeze: list[Unfreeze] = []
    """Gradual unfreezing (arXiv:1801.06146): `{step: 100, last_layers: 4}` and more of them, by rising steps."""

    def apply(self, model: nn.Module) -> None:
        from . import partial

        partial.apply(self, model)

    def begins(self, model: nn.Module) -> dict[str, int]:
        """Each parameter that begins to move later, and the number of optimiser steps that are taken before."""
        from . import partial

        return partial.begins(self, model)


Trainable = Annotated[
    Full | Partial | LoRA | DoRA | Bottleneck | Prefix | Prompt | PTuning | IA3, Field(discriminator="kind")
]
