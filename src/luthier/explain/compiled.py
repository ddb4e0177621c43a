"""What compiled layers keep for the backward pass: the graphs are made and cut as a run's are, and never run.

A compiled layer keeps less than an eager one, as the cut between forward and backward (a minimum cut: keep little,
recompute what is cheap) is chosen over the whole graph. So that cut is asked for, on shapes.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..models import attention


def signature(layer: nn.Module, arguments: tuple, keywords: dict) -> tuple:
    """Equal for layers whose graphs are equal."""
    inside = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    window = getattr(getattr(layer, "self_attn", layer), "sliding_window", None)
    inputs = tuple(t.requires_grad for t in (*arguments, *keywords.values()) if isinstance(t, Tensor))
    return inside, window, inputs


def kept(layer: nn.Module, arguments: tuple, keywords: dict) -> int:
    """Bytes that the layer's graph keeps, its input included where that is kept, on a GPU in 16 bits."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    hidden = next(t for t in (*arguments, *keywords.values()) if isinstance(t, Tensor))
    found: list[int] = [0]

    def forward(graph: torch.fx.GraphModule, _: Any) -> Any:
        (outputs,) = next(n for n in graph.graph.nodes if n.op == "output").args
        for node in dict.fromkeys(n for n in outputs if isinstance(n, torch.fx.Node)):  # type: ignore[union-attr]
            value = node.meta.get("val")
            if isinstance(value, Tensor) and (node.op != "placeholder" or value.shape == hidden.shape):
                found[0] += value.numel() * value.element_size()
        found[0] -= hidden.numel() * hidden.element_size()  # what is handed on; the next layer counts what it keeps
        return make_boxed_func(graph.forward)

    def backward(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=backward, partition_fn=min_cut_rematerialization_partition
    )
    arguments = tuple(_leaf(a) for a in arguments)
    keywords = {name: _leaf(a) for name, a in keywords.items()}
    before = attention.on_flash
    attention.on_flash = lambda t: t.shape[-1] % 8 == 0 and t.shape[-1] <= 256
    try:
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what tracing warns of says nothing about the run
            torch.compile(layer.forward, backend=backend, dynamic=False)(*arguments, **keywords)
    finally:
        attention.on_flash = before
        torch._dynamo.reset()
    return max(0, found[0])


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
