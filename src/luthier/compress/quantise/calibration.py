"""What enters each linear layer on the calibration rows: one block at a time, sums over tokens and never all inputs.

Held are the rows as they enter the block at hand, tokens x hidden, and of its layers X^T X and mean magnitudes. A block
is seen with inputs that the blocks before it, rounded already, give, as GPTQ does (https://arxiv.org/abs/2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ... import surgery
from ...errors import ModelError
from ..prune.importance import hooked

Documents = Sequence[Sequence[int]]


@dataclass
class Unit:
    """Linear layers of a block that are given the same inputs, such as a query, a key and a value projection."""

    names: list[str]
    """Within the model."""
    layers: list[Any]
    norm: nn.Module | None = None
    """The norm that the inputs come out of, where they come straight from one."""
    tokens: int = 0
    hessian: Tensor | None = None  # [in, in] sum of x x^T over tokens
    total: Tensor | None = None  # [in] sum of |x|

    def take(self, x: Tensor) -> None:
        """Inputs [..., in] of some tokens."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(flat):
            return
        product, size = flat.t() @ flat, flat.abs().sum(0)
        self.tokens += len(flat)
        self.hessian = product if self.hessian is None else self.hessian.add_(product)
        self.total = size if self.total is None else self.total.add_(size)

    @property
    def sizes(self) -> Tensor:
        """[in] mean magnitudes."""
        assert self.total is not None
        return self.total / self.tokens

    def scaled(self, by: Tensor) -> None:
        """Inputs are divided by these [in] from here on."""
        assert self.hessian is not None
        assert self.total is not None
        self.hessian /= by[:, None] * by
        self.total /= by

    def forget(self) -> None:
        self.hessian = self.total = None


@dataclass
class Stream:
    """Calibration rows on their way through the blocks."""

    model: Any
    hidden: list[Tensor]
    """Of each row what enters the block at hand, [1, tokens, hidden]."""
    given: list[list[dict]] = field(repr=False)
    """Of each row what else each block is given."""
    tuples: list[bool] = field(repr=False)
    """Which blocks give their output in a tuple."""
    at: int = 0

    @property
    def prefix(self) -> str:
        return f"{surgery.blocks(self.model)[0]}.{self.at}"

    @property
    def block(self) -> Any:
        return surgery.blocks(self.model)[1][self.at]

    def run(self, row: int) -> Tensor:
        """What the block makes of a row, [1, tokens, hidden]."""
        out = self.block(self.hidden[row], **self.given[row][self.at])
        return out[0] if isinstance(out, tuple) else out

    def to_the_end(self, row: int) -> Tensor:
        """[1, tokens, V] logits of a row, through the block at hand and all that comes after it."""
        blocks: list[Any] = list(surgery.blocks(self.model)[1])
        state = self.hidden[row]
        for at in range(self.at, len(blocks)):
            out = blocks[at](state, **self.given[row][at])
            state = out[0] if isinstance(out, tuple) else out
        tokens = torch.zeros(1, state.shape[1], dtype=torch.long, device=state.device)
        with passing(blocks, self.tuples, state):
            return self.model(input_ids=tokens, use_cache=False).logits

    @torch.no_grad()
    def observed(self, names: Sequence[str]) -> list[Unit]:
        """The layers of the block at hand among `names`, by what they share, with sums of their inputs; in the order
        in which the block comes to them. Layers that no token came to are units of their own."""
        units = self.units(names)
        taking = [unit.layers[0].register_forward_pre_hook(_taking(unit)) for unit in units]
        with hooked(taking):
            for row in range(len(self.hidden)):
                self.run(row)
        return units

    @torch.no_grad()
    def units(self, names: Sequence[str]) -> list[Unit]:
        """The same without sums."""
        inside = {id(self.model.get_submodule(n)): n for n in names if n.startswith(self.prefix + ".")}
        found: list[tuple[Tensor, Unit]] = []
        normed: list[tuple[Tensor, nn.Module]] = []

        def enters(module: nn.Module, given: tuple) -> None:
            x = given[0]
            for seen, unit in found:
                if seen is x:
                    unit.names.append(inside[id(module)])
                    unit.layers.append(module)
                    return
            norm = next((m for out, m in normed if out is x), None)
            found.append((x, Unit([inside[id(module)]], [module], norm)))

        def leaves(module: nn.Module, given: tuple, out: Any) -> None:
            normed.append((out, module))

        handles = []
        for module in self.block.modules():
            if id(module) in inside:
                handles.append(module.register_forward_pre_hook(enters))
            elif isinstance(w := getattr(module, "weight", None), nn.Parameter) and w.ndim == 1:
                handles.append(module.register_forward_hook(leaves))
        with hooked(handles):
            self.run(0)
        met = {name for _, unit in found for name in unit.names}
        alone = [Unit([name], [self.model.get_submodule(name)]) for name in inside.values() if name not in met]
        return [unit for _, unit in found] + alone

    @torch.no_grad()
    def advance(self) -> None:
        """On to the next block."""
        for row in range(len(self.hidden)):
            self.hidden[row] = self.run(row)
        self.at += 1


def _taking(unit: Unit) -> Callable:
    def hook(module: nn.Module, given: tuple) -> None:
        unit.take(given[0])

    return hook


@torch.no_grad()
def stream(model: Any, documents: Documents) -> Stream:
    """Rows (tokens) as they enter the first block; no block but those of the first row is computed for it."""
    _, blocks = surgery.blocks(model)
    device, tuples = model.get_input_embeddings().weight.device, [False] * len(blocks)
    made = Stream(model, [], [], tuples)

    def before(at: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if len(args) > 1:
                kind = type(model).__name__
                raise ModelError(f"{kind} hands its layers more than can be kept: use --rounding nearest")
            if at == 0:
                made.hidden.append(args[0] if args else kwargs["hidden_states"])
                made.given.append([])
            made.given[-1].append({k: v for k, v in kwargs.items() if k != "hidden_states"})

        return hook

    def after(at: int) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            tuples[at] = isinstance(out, tuple)

        return hook

    def enter(document: Sequence[int]) -> None:
        model.base_model(input_ids=torch.tensor([list(document)], device=device), use_cache=False)

    with hooked([b.register_forward_pre_hook(before(i), with_kwargs=True) for i, b in enumerate(blocks)]):
        with hooked([b.register_forward_hook(after(i)) for i, b in enumerate(blocks)]):
            enter(documents[0])
        with passing(list(blocks), tuples):
            for document in documents[1:]:
                enter(document)
    return made


@contextmanager
def passing(blocks: Sequence[Any], tuples: Sequence[bool], state: Tensor | None = None) -> Iterator[None]:
    """Blocks that hand on what they are given, for a while, or give this `state`."""

    def through(as_tuple: bool) -> Callable:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = hidden_states if state is None else state
            return (out,) if as_tuple else out

        return forward

    try:
        for block, as_tuple in zip(blocks, tuples):
            block.forward = through(as_tuple)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
