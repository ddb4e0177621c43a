"""Which layers need more bits: what the network's answers lose when one group of layers alone is rounded.

The loss is the mean Kullback-Leibler divergence of the next token, KL(source || rounded), over calibration tokens.
Bits go where they take away most of it for what they cost, until the budget is spent; losses are taken to add up, and
what 8 bits lose is taken for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import surgery
from .calibration import Documents, Stream, stream

ROWS, TOKENS = 4, 64  # of calibration that are looked at


@dataclass(frozen=True)
class Measured:
    weights: dict[str, int]
    """Of each of the layers, how many."""
    loss: float
    """Nats a token with these layers in few bits and all others as they are."""


@torch.no_grad()
def measured(
    model: Any, documents: Documents, names: Sequence[str], rounded: Callable[[Any], Tensor],
    say: Callable[[str], None] = lambda text: None,
) -> list[Measured]:  # fmt: skip
    """Of all layers `names`, those that share their inputs together; `rounded` gives the weight of a layer in few bits.

    The network stays as it is.
    """
    flow = stream(model, [d[:TOKENS] for d in documents[:ROWS]])
    plain = [_logprobs(model, d) for d in (documents[i][:TOKENS] for i in range(len(flow.hidden)))]
    found = []
    depth = len(surgery.blocks(model)[1])
    for at in range(depth):
        for unit in flow.units(names):
            kept = [layer.weight.data for layer in unit.layers]
            for layer in unit.layers:
                layer.weight.data = rounded(layer).to(layer.weight.dtype)
            loss = _divergence(flow, plain)
            for layer, weight in zip(unit.layers, kept):
                layer.weight.data = weight
            found.append(Measured({n: w.numel() for n, w in zip(unit.names, kept)}, loss))
        flow.advance()
        if (at + 1) % 10 == 0:
            say(f"sensitivity: {at + 1} of {depth} blocks")
    return found


def _logprobs(model: Any, document: Sequence[int]) -> Tensor:
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=torch.tensor([list(document)], device=device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _divergence(flow: Stream, plain: Sequence[Tensor]) -> float:
    total = 0.0
    for row, expected in enumerate(plain):
        logprobs = flow.to_the_end(row)[0].float().log_softmax(-1)
        total += float((expected.exp() * (expected - logprobs)).sum())
    return total / sum(len(expected) for expected in plain)


def chosen(found: Sequence[Measured], few: Mapping[str, float], many: Mapping[str, float], budget: float) -> set[str]:
    """The layers that get many bits: `few` and `many` are the bits of a weight of each layer with its scales, `budget`
    their mean over all weights. The best loss for its bits first; what does not fit is passed over."""
    total = sum(sum(m.weights.values()) for m in found)
    left = total * budget - sum(few[name] * size for m in found for name, size in m.weights.items())

    def cost(m: Measured) -> float:
        return sum((many[name] - few[name]) * size for name, size in m.weights.items())

    taken: set[str] = set()
    for m in sorted(found, key=lambda m: m.loss / cost(m), reverse=True):
        if cost(m) <= left:
            left -= cost(m)
            taken |= set(m.weights)
    return taken
