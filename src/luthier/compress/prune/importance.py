"""How much each layer, head, channel and dimension does, measured from activations on calibration rows.

Heads, channels and dimensions as in Minitron (https://arxiv.org/abs/2407.14679, section 2.2): the mean over a row's
tokens of sizes of activations, then the L2 norm over rows. Layers as in ShortGPT (https://arxiv.org/abs/2403.03853).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import Sizes, layers

Documents = Sequence[Sequence[int]]


def over_rows(rows: Sequence[Tensor]) -> Tensor:
    """sizes [T, K] of the activations of each row -> [K]: L2 over rows of the mean over tokens."""
    return torch.stack([row.float().mean(0) for row in rows]).square().sum(0).sqrt()


def influence(before: Tensor, after: Tensor) -> Tensor:
    """[T] 1 - cosine of a layer's input and output [T, H], the block influence of each token."""
    return 1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)


@dataclass
class Parts:
    """Of the parts of a network's layers; the larger, the more it does."""

    heads: Tensor  # [L, heads]
    channels: Tensor  # [L, channels]
    hidden: Tensor  # [hidden]
    energy: dict[str, Tensor]  # of each norm of the stream the mean square of what it is given, [hidden]


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: Any, documents: Documents, after: Callable[[], None] = lambda: None) -> None:
    """The network over each document alone."""
    device = model.get_input_embeddings().weight.device
    for document in documents:
        model.base_model(input_ids=torch.tensor([list(document)], device=device), use_cache=False)
        after()


def stream_norms(model: Any) -> dict[str, nn.Module]:
    """The norms over the residual stream, by name."""
    width = model.config.hidden_size
    return {
        name: module for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and tuple(module.weight.shape) == (width,)
        and not name.endswith(("q_norm", "k_norm"))
    }  # fmt: skip


def parts(model: Any, documents: Documents) -> Parts:
    """Heads by the L2 norm of what they give, channels by |what goes into the last product|, dimensions by |what norms
    give|, added up over norms."""
    sizes, handles = Sizes.of(model.config), []
    sums: dict[Any, Tensor] = {}
    now: dict[Any, Tensor] = {}
    energy: dict[str, Tensor] = {}
    tokens = sum(map(len, documents))

    def heads(at: int) -> Callable:
        def hook(module: nn.Module, given: tuple) -> None:
            now["heads", at] = given[0][0].float().unflatten(-1, (sizes.heads, -1)).norm(dim=-1)

        return hook

    def channels(at: int) -> Callable:
        def hook(module: nn.Module, given: tuple) -> None:
            now["channels", at] = given[0][0].float().abs()

        return hook

    def norms(name: str) -> Callable:
        def hook(module: nn.Module, given: tuple, out: Tensor) -> None:
            now["hidden", name] = out[0].float().abs()
            energy[name] = energy.get(name, 0) + given[0][0].float().square().sum(0) / tokens

        return hook

    for at, layer in enumerate(layers(model)):
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(heads(at)))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(channels(at)))
    for name, module in stream_norms(model).items():
        handles.append(module.register_forward_hook(norms(name)))

    def count() -> None:
        for key, value in now.items():
            sums[key] = sums.get(key, 0) + value.mean(0).square()
        now.clear()

    with hooked(handles):
        run(model, documents, count)
    order = range(sizes.layers)
    return Parts(
        torch.stack([sums["heads", i] for i in order]).sqrt(),
        torch.stack([sums["channels", i] for i in order]).sqrt(),
        torch.stack([value for (kind, _), value in sums.items() if kind == "hidden"]).sqrt().sum(0),
        energy,
    )


def influences(model: Any, documents: Documents) -> Tensor:
    """[L] the mean over all tokens of each layer's block influence."""
    found = torch.zeros(len(layers(model)), dtype=torch.float64)
    tokens = sum(map(len, documents))

    def keep(at: int) -> Callable:
        def hook(module: nn.Module, given: tuple, out: Any) -> None:
            after = out[0] if isinstance(out, tuple) else out
            found[at] += influence(given[0], after).double().sum().cpu() / tokens

        return hook

    with hooked([layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers(model))]):
        run(model, documents)
    return found


def perplexities(model: Any, documents: Documents) -> Tensor:
    """[L] the perplexity of the documents without each layer alone (https://arxiv.org/abs/2402.02834)."""
    return torch.tensor([_without(model, at, documents) for at in range(len(layers(model)))], dtype=torch.float64)


def _without(model: Any, at: int, documents: Documents) -> float:
    layer: Any = layers(model)[at]
    own = layer.forward

    def passed(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    layer.forward = passed
    try:
        return perplexity(model, documents)
    finally:
        layer.forward = own


@torch.no_grad()
def perplexity(model: Any, documents: Documents) -> float:
    """Of all tokens but each document's first."""
    device = model.get_input_embeddings().weight.device
    total, count = 0.0, 0
    for document in documents:
        tokens = torch.tensor([list(document)], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        total -= logits.log_softmax(-1).gather(-1, tokens[0, 1:, None]).double().sum().item()
        count += len(document) - 1
    return math.exp(min(total / max(count, 1), 700.0))
