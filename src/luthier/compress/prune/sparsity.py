"""Single weights that become 0: by magnitude or Wanda's score, anywhere or two of each four neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import surgery
from ...errors import ModelError
from .importance import Documents, hooked
from .settings import Pruning

Say = Callable[[str], None]


def scores(weight: Tensor, inputs: Tensor | None) -> Tensor:
    """[out, in] |W|, or, with the L2 norms [in] of its inputs over all tokens, |W_ij| ||X_j|| (arXiv:2306.11695)."""
    size = weight.abs().float()
    return size if inputs is None else size * inputs.float()


def unstructured(scores: Tensor, share: float, each_row: bool) -> Tensor:
    """[out, in] which weights stay: the share of largest scores of the whole layer, or of each of its rows.

    The number that goes is rounded, and exact; of equal scores the earlier go.
    """
    flat = scores if each_row else scores.reshape(1, -1)
    gone = round((1 - share) * flat.shape[1])
    order = torch.sort(flat, dim=1, stable=True).indices[:, :gone]
    return torch.ones_like(flat, dtype=torch.bool).scatter_(1, order, False).view_as(scores)


def two_of_four(scores: Tensor) -> Tensor:
    """[out, in] the two largest of each four neighbours of a row stay; of equal ones the later."""
    groups = scores.reshape(len(scores), -1, 4)
    order = torch.sort(groups, dim=2, stable=True).indices[..., :2]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(2, order, False).view_as(scores)


def mask(weight: Tensor, inputs: Tensor | None, wanted: Pruning) -> Tensor:
    """Which weights [out, in] of a layer stay. Wanda compares within a row, magnitude within the layer."""
    found = scores(weight, inputs)
    if wanted.pattern == "2:4":
        return two_of_four(found)
    assert wanted.target is not None, "checked with the settings"
    return unstructured(found, wanted.target, inputs is not None)


def linears(model: Any) -> dict[str, nn.Module]:
    """The linear layers inside of the network's blocks, by name."""
    place, _ = surgery.blocks(model)
    found = {n: m for n, m in model.named_modules() if n.startswith(place + ".") and surgery.linear_shape(m)}
    fused = [n for n, p in model.named_parameters() if n.startswith(place + ".") and p.ndim > 2 and "conv" not in n]
    if fused:
        raise ModelError(
            f"{fused[0]} holds several layers in one, as experts do, which pruning of weights does not know"
        )
    return found


def weight(module: Any) -> Tensor:
    """As the layer keeps it."""
    return module.weight


def check_pattern(model: Any, wanted: Pruning) -> None:
    for name, module in linears(model).items():
        shape = surgery.linear_shape(module)
        assert shape is not None
        if wanted.pattern == "2:4" and shape[0] % 4:
            raise ModelError(f"--pattern 2:4: {name} has {shape[0]} inputs, not a multiple of 4")


@torch.no_grad()
def prune_(module: Any, inputs: Tensor | None, wanted: Pruning) -> None:
    kept = weight(module).data
    turned = surgery.transposed(module)
    stays = mask(kept.t() if turned else kept, inputs, wanted)
    kept.mul_(stays.t() if turned else stays)


def magnitude_(model: Any, wanted: Pruning) -> None:
    """Every linear layer of the blocks, in place."""
    for module in linears(model).values():
        prune_(module, None, wanted)


@torch.no_grad()
def wanda_(model: Any, documents: Documents, wanted: Pruning) -> None:
    """Block by block, in place: a block sees what the blocks before it, pruned already, make of the documents."""
    _, blocks = surgery.blocks(model)
    hidden, given = _entered(model, blocks, documents)
    for at, block in enumerate(blocks):
        squares: dict[nn.Module, Tensor] = {}
        inside = [m for m in block.modules() if surgery.linear_shape(m)]
        with hooked([m.register_forward_pre_hook(_adding(squares)) for m in inside]):
            for state, (args, more) in zip(hidden, (each[at] for each in given)):
                block(state, *args, **more)
        for module in inside:
            if module in squares:
                prune_(module, squares[module].sqrt(), wanted)
        for i, state in enumerate(hidden):
            args, more = given[i][at]
            out = block(state, *args, **more)
            hidden[i] = out[0] if isinstance(out, tuple) else out


def _adding(squares: dict[nn.Module, Tensor]) -> Callable:
    def hook(module: nn.Module, given: tuple) -> None:
        found = given[0].detach().float().reshape(-1, given[0].shape[-1]).square().sum(0)
        squares[module] = squares.get(module, 0) + found

    return hook


def _entered(model: Any, blocks: nn.ModuleList, documents: Documents) -> tuple[list[Tensor], list[list[tuple]]]:
    """Of each document what enters the first block, and what else every block is given."""
    hidden: list[Tensor] = []
    given: list[list[tuple[tuple, dict]]] = []
    device = model.get_input_embeddings().weight.device

    def keep(at: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            state = args[0] if args else kwargs["hidden_states"]
            if at == 0:
                hidden.append(state)
                given.append([])
            given[-1].append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        return hook

    with hooked([b.register_forward_pre_hook(keep(i), with_kwargs=True) for i, b in enumerate(blocks)]):
        for document in documents:
            model.base_model(input_ids=torch.tensor([list(document)], device=device), use_cache=False)
    return hidden, given


def zeros(model: Any) -> tuple[int, int]:
    """(zeros, weights) of the blocks' linear layers."""
    found = [weight(m) for m in linears(model).values()]
    return sum(int((w == 0).sum()) for w in found), sum(w.numel() for w in found)
