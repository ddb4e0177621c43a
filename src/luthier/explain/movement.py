"""What moves, from which step on, and through how many layers the backward pass walks for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..surgery import QuantisedLinear, VirtualTokens, base_name, blocks


@dataclass(frozen=True)
class Moving:
    """The parameters of one name in all layers."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    trainable: int  # elements
    total: int
    begins: int = 0  # optimiser steps that are taken before it moves


def moving(model: nn.Module, begins: Mapping[str, int] | None = None) -> list[Moving]:
    """All parameters, those of equal layers in one line: `model.layers.{0-29}.mlp.up_proj.weight`.

    `begins` gives the step of those that move later.
    """
    begins = begins or {}
    groups: dict[tuple, list[tuple[int | None, int]]] = {}
    for name, shape, dtype, moves in _weights(model):
        shown = base_name(name)
        number = re.search(r"\.(\d+)\.", shown)
        pattern = shown[: number.start()] + ".{}." + shown[number.end() :] if number else shown
        key = (pattern, shape, dtype, moves or name in begins, begins.get(name, 0))
        groups.setdefault(key, []).append((int(number[1]) if number else None, math.prod(shape)))
    out = []
    for (pattern, shape, dtype, trainable, begin), members in groups.items():
        layers = [n for n, _ in members if n is not None]
        name = pattern.replace("{}", _span(layers)) if layers else pattern
        total = sum(count for _, count in members)
        out.append(Moving(name, len(members), shape, dtype, total if trainable else 0, total, begin))
    return out


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], str, bool]]:
    """Name, shape, numbers and whether it moves; a layer in fewer bits has a weight, too, that is no parameter."""
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), parameter.requires_grad
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            yield f"{name}.weight", (module.out_features, module.in_features), module.kind, False
            if module.bias is not None:
                yield f"{name}.bias", tuple(module.bias.shape), str(module.bias.dtype).removeprefix("torch."), False


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def walked(model: Any, begins: Mapping[str, int] | None = None, step: int = 0) -> tuple[int, int]:
    """Through how many layers the backward pass walks at a step, and of how many.

    It walks down to the lowest parameter that moves: through all layers where the embeddings or virtual tokens do.
    """
    prefix, layers = blocks(model)
    names = [
        name
        for name, p in model.named_parameters()
        if (begins[name] <= step if begins and name in begins else p.requires_grad)
    ]
    inside = [int(name[len(prefix) + 1 :].split(".")[0]) for name in names if name.startswith(prefix + ".")]
    first = [model.get_input_embeddings(), *(m for m in model.children() if isinstance(m, VirtualTokens))]
    embeddings = {id(p) for module in first for p in module.parameters()}
    below = any(id(model.get_parameter(name)) in embeddings for name in names)
    lowest = 0 if below else min(inside, default=len(layers))
    return len(layers) - lowest, len(layers)


def walk_line(model: Any, begins: Mapping[str, int] | None = None) -> str:
    """How far the backward pass goes, in words, with the reason where a tied head takes it all the way."""
    stages = [(step, *walked(model, begins, step)) for step in sorted({0, *(begins or {}).values()})]
    text = f"backward through {stages[0][1]} of {stages[0][2]} layers"
    for step, passed, _ in stages[1:]:
        text += f", {passed} from step {step} on"
    return text + _tied(model, begins or {})


def _tied(model: Any, begins: Mapping[str, int]) -> str:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    shared = {id(p) for p in embeddings.parameters()} & of_head
    moved = [n for n, p in model.named_parameters() if id(p) in shared and (p.requires_grad or n in begins)]
    others = [n for n, p in model.named_parameters() if n not in moved and not p.requires_grad and n not in begins]
    if moved and others:
        return " (the head is tied to the embeddings: both move, so that gradients are carried through all layers)"
    return ""


def table(model: nn.Module, begins: Mapping[str, int] | None = None):
    """What moves, as a table for the console; what is frozen, in its last lines."""
    from rich.table import Table

    rows = moving(model, begins)
    late = any(row.begins for row in rows)
    made = Table(title="what moves", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for caption in ("parameters", "shape", "dtype", *(["from step"] if late else [])):
        made.add_column(caption)
    made.add_column("trained", justify="right")
    for row in sorted(rows, key=lambda row: row.begins):
        if row.trainable:
            times = f"{row.count} x " if row.count > 1 else ""
            when = [str(row.begins)] if late else []
            made.add_row(row.name, times + "x".join(map(str, row.shape)), row.dtype, *when, f"{row.trainable:,}")
    trained, total = sum(r.trainable for r in rows), sum(r.total for r in rows)
    gap = [""] * (3 if late else 2)
    made.add_row("frozen", *gap, f"{total - trained:,} stay")
    made.add_row("all", *gap, f"{trained:,} of {total:,} ({trained / total:.2%})", style="bold")
    made.caption, made.caption_justify = walk_line(model, begins), "left"
    return made
