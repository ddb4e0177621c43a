"""What a run works with: its network and objective, what of them moves, and how they were at the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, surgery, teachers
from .config import Config
from .data.masks import Renderer
from .models import network
from .parallel.ranks import Ranks
from .trainable import saved


class Start(dict[str, torch.Tensor]):
    """First values of what moves, where they are needed; exchanged with the present ones once, however often asked."""

    inside = False

    @contextmanager
    def put(self, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
        if self.inside:
            yield
            return
        self.inside = True
        try:
            with surgery.swapped(parameters, self):
                yield
        finally:
            self.inside = False


@dataclass
class Assembled:
    """What a run works with."""

    config: Config
    network: network.Network
    objective: Any
    tokenizer: Any
    renderer: Renderer
    ranks: Ranks
    begins: dict[str, int] = field(default_factory=dict)  # parameter -> steps taken before it moves, where not from 0
    sources: saved.Sources | None = None  # the adapters that were loaded
    start: Start = field(default_factory=Start)
    teacher: teachers.Teacher | None = None  # frozen, once an objective asked for it

    def unfreeze(self, step: int) -> None:
        """Let move what moves after `step` optimiser steps. Nothing is computed for what does not move yet."""
        for name, begin in self.begins.items():
            self.network.model.get_parameter(name).requires_grad_(begin <= step)
        self.config.precision.begin(self.network.model, step)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """The network as it was before it was trained: with the adapters that lie beneath, and as a saved one began."""
        kept = {entry.name for entry in self.config.model.beneath}
        kept |= {saved.TRAINED} if self.sources and saved.TRAINED in self.sources.files else set()
        off = set(surgery.names(self.network.model)) - kept
        with surgery.adapters_off(self.network.model, off), self.start.put(self.parameters()):
            yield

    @contextmanager
    def reference(self) -> Iterator[network.Network]:
        """The same, for an objective to compare with: without gradients and without what is random in training."""
        training = self.network.training
        with torch.no_grad(), self.as_base():
            self.network.eval()
            try:
                yield self.network
            finally:
                self.network.train(training)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that ever moves: of the network under its own names, of the objective under `objective.`"""
        named = self.network.model.named_parameters()
        moving = {name: p for name, p in named if p.requires_grad or name in self.begins}
        return moving | {f"objective.{n}": p for n, p in surgery.trainable(self.objective).items()}

    def constants(self) -> dict[str, torch.Tensor]:
        """What adapters drew at the start and need ever after, by name."""
        own = surgery.constants(self.objective)
        return surgery.constants(self.network.model) | {f"objective.{name}": t for name, t in own.items()}

    def load_weights(self, folder: Path, group: str = "weights") -> None:
        """What moves, from a checkpoint: the weights of its step, or the group of its tensors that is deployed."""
        passing = tuple(f"objective.{name}" for name in getattr(self.objective, "passing", ()))
        for of_group, named in ((group, self.parameters()), ("constants", self.constants())):
            tensors = checkpoint.read_tensors(folder, of_group)
            if passing:  # served training alone, and are there only while a run trains
                tensors = {n: t for n, t in tensors.items() if n in named or not n.startswith(passing)}
            checkpoint.load_into(named, tensors, str(folder))
