"""Whole models of one base as one, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from ...models import streaming, translation
from ..plain import Plain, built
from . import ways
from .settings import Merging

RELATED = 0.5  # cosine of the weights of two models: those that were trained from one start have nearly 1


@dataclass
class Weights:
    """The tensors of a model, each read when it is asked for where they lie in files."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def weights(source: Plain) -> Weights:
    """Of a folder its files; of anything else what is in memory."""
    path = Path(source.name).expanduser()
    named = dict(source.model.named_parameters())
    if source.run is None and path.is_dir():
        files = streaming.entries(sorted(path.glob("*.safetensors")))
        if files.keys() >= named.keys():
            scratch = torch.empty(0, dtype=torch.uint8)
            return Weights(source.name, {n: files[n].shape for n in named}, lambda n: files[n].read(scratch))
    return Weights(source.name, {n: tuple(p.shape) for n, p in named.items()}, lambda n: named[n].detach().cpu())


def check(found: Sequence[Plain], read: Sequence[Weights]) -> None:
    """Whether they are models of one shape, with one vocabulary, that were trained from one start."""
    first, shapes = found[0], read[0].shapes
    for other, own in zip(found[1:], read[1:]):
        if own.shapes.keys() != shapes.keys():
            name = sorted(own.shapes.keys() ^ shapes.keys())[0]
            raise ModelError(f"{first.name} and {other.name} are of different shapes: only one of them has {name}")
        if wrong := [n for n in shapes if shapes[n] != own.shapes[n]]:
            raise ModelError(
                f"{first.name} and {other.name} are of different shapes: {wrong[0]} is {list(shapes[wrong[0]])} and "
                f"{list(own.shapes[wrong[0]])}"
            )
        if apart := translation.difference(first.tokenizer, other.tokenizer):
            raise ModelError(f"{first.name} and {other.name} have different vocabularies: {apart}")
        name = max(shapes, key=lambda n: (torch.Size(shapes[n]).numel(), n))
        cosine = torch.cosine_similarity(
            read[0].read(name).flatten().float(), own.read(name).flatten().float(), 0
        ).item()
        if not abs(cosine) >= RELATED:
            raise ModelError(
                f"{first.name} and {other.name} were not trained from one start: the cosine of their {name} is "
                f"{cosine:.2f}, and weights that mean different things cannot be brought together"
            )


def merged(found: Sequence[Plain], base: Plain | None, wanted: Merging) -> Any:
    """The model of them all, in float32 on the CPU."""
    read = [weights(source) for source in found]
    of_base = weights(base) if base is not None else None
    together = [*found, base] if base is not None else found
    check(together, [*read, of_base] if of_base is not None else read)
    state = {}
    for name in read[0].shapes:
        below = of_base.read(name) if of_base is not None else None
        state[name] = ways.merged(wanted, name, [own.read(name) for own in read], below)
    made = built(found[0].model.config, state, torch.float32)
    made.generation_config = found[0].model.generation_config
    return made
