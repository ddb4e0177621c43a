"""What a run will do, said before it does it: what moves, how many rows, steps and tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .data.blocks import Steps, Stream
from .data.dataset import Dataset
from .data.stream import Plan


@dataclass(frozen=True)
class Moving:
    """The parameters of one name in all layers."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    trainable: int  # elements
    total: int


def moving(model: nn.Module) -> list[Moving]:
    """All parameters, those of equal layers in one line: `model.layers.{0-29}.mlp.up_proj.weight`."""
    groups: dict[tuple, list[tuple[int | None, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)
        pattern = name[: number.start()] + ".{}." + name[number.end() :] if number else name
        key = (pattern, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), parameter.requires_grad)
        groups.setdefault(key, []).append((int(number[1]) if number else None, parameter))
    out = []
    for (pattern, shape, dtype, trainable), members in groups.items():
        layers = [n for n, _ in members if n is not None]
        name = pattern.replace("{}", _span(layers)) if layers else pattern
        total = sum(p.numel() for _, p in members)
        out.append(Moving(name, len(members), shape, dtype, total if trainable else 0, total))
    return out


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def table(model: nn.Module):
    """What moves, as a table for the console; what is frozen, in its last lines."""
    from rich.table import Table

    rows = moving(model)
    made = Table(title="what moves", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for caption in ("parameters", "shape", "dtype"):
        made.add_column(caption)
    made.add_column("trained", justify="right")
    for row in rows:
        if row.trainable:
            times = f"{row.count} x " if row.count > 1 else ""
            made.add_row(row.name, times + "x".join(map(str, row.shape)), row.dtype, f"{row.trainable:,}")
    trained, total = sum(r.trainable for r in rows), sum(r.total for r in rows)
    made.add_row("frozen", "", "", f"{total - trained:,} stay")
    made.add_row("all", "", "", f"{trained:,} of {total:,} ({trained / total:.2%})", style="bold")
    return made


def plan_line(dataset: Dataset | Stream, steps: Plan | Steps, micro_tokens: int) -> str:
    if isinstance(steps, Steps):
        return steps.caption
    assert isinstance(dataset, Dataset)
    rows, count, tokens = len(steps.rows) - 1, len(steps), steps.tokens()
    lines = [
        f"{len(dataset):,} rows, {dataset.tokens:,} tokens, {dataset.trained_tokens:,} of them learnt; "
        f"{count:,} steps of {len(steps.documents) / count:.1f} rows in {rows / count:.1f} packed rows "
        f"({tokens / (rows * micro_tokens):.1%} of {micro_tokens} slots each)"
    ]
    return "\n".join(lines + dataset.passes(steps))
