"""One optimiser step on shapes alone: the run's own network, objective and optimiser, on tensors without values.

What autograd keeps for the backward pass depends on the family, on what moves, on recomputation and on every product
that somebody rewrote. So nothing of it is reckoned by a formula that would have to be kept in step: the code itself
runs, on the meta device, and the bytes that live are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..assembled import Assembled
from ..batch import Batch, Known
from ..optim.optimizer import Optimizer
from ..surgery import QuantisedLinear, added, blocks, roles
from . import compiled as compiled_layers
from .heap import Heap
from .ledger import Ledger, size_of
from .movement import walked
from .plan import Passed, Row
from .pretence import pretence


@dataclass(frozen=True)
class Memory:
    """Bytes in one process."""

    weights: int  # of the network, adapters and buffers apart
    adapters: int
    buffers: int
    gradients: int
    optimizer: int  # moments and masters
    activations: int  # kept for the backward pass of one row, after the last layer
    head: int  # what the loss adds to them at its peak: a chunk of logits and gradients made on the way
    working: int  # what else lives at the peak: passing values
    gaps: int  # on a CPU, what the heap takes beside what lives in it
    peak: int  # of what lives
    peak_at: str  # forward and backward, or the optimiser's step

    @property
    def taken(self) -> int:
        """What the process takes for it."""
        return self.peak + self.gaps


@dataclass(frozen=True)
class Work:
    """Floating-point operations in matrix products, and attention beside them, of one row."""

    forward: int
    backward: int  # recomputation included
    attention_forward: int
    attention_backward: int
    tokens: int  # that are run
    squares: int  # as plan.Passed has them


def batch_of(row: Row) -> Batch:
    """A row's shapes, without values."""
    total = row.tokens

    def empty(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    ends, end = [0], 0
    for length in row.lengths:
        end += length
        ends.append(end)
    tokens = empty(total, torch.int64)
    return Batch(
        tokens=tokens, positions=empty(total, torch.int64), ends=tuple(ends),
        targets=empty(total, torch.int64), weights=empty(total, torch.float32), trained=empty(row.learnt, torch.int64),
        rows=tuple(range(len(row.units or ends) - 1)), units=row.units,
        token_fields={"labels": empty(total, torch.int64)} if row.tags else {},
        fields={"labels": torch.empty(len(row.units or ends) - 1, row.labels, device="meta")} if row.labels else {},
        known=Known(tokens, row.alike) if row.alike else None,
    )  # fmt: skip


def spans(made: Assembled, row: Row, device: str) -> tuple[int, list[tuple[int, int]]]:
    """How many tokens of a row are run, and of each document its length and how much of it is run before it already.

    Of rows whose second members are run apart, as the answers of other rows are, both parts.
    """
    batch = batch_of(row)
    found: list[tuple[int, int]] = []
    run = 0
    with pretence(device, batch.ends):
        parts = [batch] if made.config.objective.rows != "unpaired" else [batch.members(0), batch.members(1)]
        for part in filter(None, parts):
            tokens, alike = made.network.passes(part)
            run += tokens
            found += zip(part.lengths, alike)
    return run, found


def passes_of(made: Assembled, row: Row, device: str) -> Passed:
    """What the network makes of a row."""
    run, found = spans(made, row, device)
    return Passed(run, sum(n * n - before * before for n, before in found))


def with_known(made: Assembled, batch: Batch) -> Batch:
    """With what the run computes ahead of its first step, or of answers when they are given, if it does."""
    if made.config.objective.rolls_out:
        with torch.no_grad():
            found = made.objective.score(made.network, batch)
        found |= {name: torch.empty(0, device="meta") for name in made.objective.credits}
        more = {name: values.new_empty(len(batch), *values.shape[1:]) for name, values in found.items()}
        return replace(batch, token_fields=batch.token_fields | more)
    if not made.config.objective.ahead:
        return batch
    with made.reference() as network:
        found = made.objective.ahead(network, batch)
    more = {name: values.new_empty(len(batch), *values.shape[1:]) for name, values in found.items()}
    return replace(batch, token_fields=batch.token_fields | more)


def rehearse(
    made: Assembled, rows: Sequence[Row], accumulate: bool, device: str, step: int = 0, compiled: bool = False
) -> tuple[Memory, Work]:
    """The memory and work of one step, after `step` others, of rows like these; the work is that of the largest.

    With `accumulate`, gradients live when a row begins; with `compiled`, layers keep what their graphs keep.
    """
    made.unfreeze(step)
    heap = Heap() if device == "cpu" else None
    ledger, model, parameters = Ledger(), made.network.model, made.parameters()
    for module in (model, made.objective, *([made.teacher.network] if made.teacher else [])):
        for tensor in (*module.parameters(), *module.buffers()):
            ledger.see(tensor)
    for tensor in made.start.values():
        ledger.see(tensor)
    loaded, (weights, own) = ledger.live, _weights(made)
    ledger.heap = heap
    largest = max(rows, key=lambda row: row.size)
    with ledger:
        optimizer = Optimizer(parameters, made.config.optim, roles=roles(model))
        average = made.config.averaging.build(optimizer.weights(), 1)
    resting, row_peak, seen = ledger.restart(), 0, None
    for row in (largest, largest) if compiled and accumulate else rows if accumulate else (largest,):
        with pretence(device, batch_of(row).ends):
            batch = with_known(made, batch_of(row))
        with pretence(device, batch.ends), ledger:
            passed = _Pass(made, ledger, batch, compiled, optimizer)
        if compiled:
            passed.compile()
        passed.calls.clear()
        row_peak = max(row_peak, passed.peak)
        seen = passed if row is largest or seen is None else seen
        del batch
    assert seen is not None
    gradients = size_of(p.grad for p in parameters.values() if p.grad is not None)
    ledger.restart()
    with pretence(device, (0,)), ledger:
        if not made.config.optim.fused_backward:
            optimizer.step(1.0, torch.empty((), device="meta"))
    step_peak = ledger.peak
    optimizer.zero_grad()
    grown = max(0, ledger.restart() - resting)  # slots that are made with the first step
    slots = size_of(optimizer.tensors().values()) + size_of(average.tensors().values() if average else ())
    peak = max(row_peak + grown, step_peak)
    in_row = row_peak + grown >= step_peak
    resident = loaded + slots + gradients
    held = seen.kept + seen.head if in_row else 0
    gaps = max(0, loaded + heap.peak - peak) if heap else 0
    memory = Memory(
        weights, own, loaded - weights - own, gradients, slots, seen.kept, seen.head, max(0, peak - resident - held),
        gaps, peak, "forward and backward" if in_row else "optimiser's step",
    )  # fmt: skip
    attention = attention_work(made, largest, device)
    return memory, Work(seen.forward, seen.backward, *attention, *passes_of(made, largest, device))


def _weights(made: Assembled) -> tuple[int, int]:
    """Bytes of network and teacher, parts of layers in fewer bits and first values among them; of adapters and the
    objective. First values are kept where the objective compares with the start and more than adapters move."""
    own = {id(p) for p in added(made.network.model)}
    models = [made.network.model, *([made.teacher.network.model] if made.teacher else [])]
    parameters = [p for model in models for p in model.parameters()]
    layers = [m for model in models for m in model.modules() if isinstance(m, QuantisedLinear)]
    parts = [part for layer in layers for part in layer.buffers()]
    extra = [p for p in parameters if id(p) in own]
    plain = [p for p in parameters if id(p) not in own]
    return size_of([*plain, *parts, *made.start.values()]), size_of([*extra, *made.objective.parameters()])


class _Pass:
    """One row forward and backward, watched."""

    def __init__(self, made: Assembled, ledger: Ledger, batch: Batch, compiled: bool, optimizer: Optimizer):
        self.compiled, self.ledger, self.layers = compiled, ledger, list(blocks(made.network.model)[1])
        flops = ledger.flops
        ledger.restart()
        if survey := getattr(made.objective, "survey", None):
            survey(made.network, [batch], lambda told: told)
        batch = made.objective.prepare(made.network, batch)
        prepared_peak, self.before = ledger.peak, ledger.restart()
        self.calls: list[tuple[tuple, dict]] = []  # of the layers
        self.borders: list[int] = []  # live bytes before each layer
        hooks = [layer.register_forward_pre_hook(self._entered, with_kwargs=True) for layer in self.layers]
        hooks.append(made.network.model.base_model.register_forward_hook(self._decoded))
        try:
            loss = made.objective(made.network, batch)
        finally:
            for hook in hooks:
                hook.remove()
        self.kept = self.after_decoder - self.before
        self.head = ledger.peak - self.after_decoder
        self.head_left = ledger.live - self.after_decoder
        self.forward = ledger.flops - flops
        if made.config.optim.fused_backward:
            optimizer.arm(1.0, torch.empty((), device="meta"))
        # From an edge, as `Tensor.backward` would switch the pretence off for the layers that are recomputed.
        torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss.total), torch.ones_like(loss.total))
        self.backward = ledger.flops - flops - self.forward
        self.peak = max(prepared_peak, self.decoder_peak, ledger.peak)

    def compile(self) -> None:
        """Correct what is kept, and the peak, for layers that run as graphs."""
        known: dict[tuple, int] = {}
        graphs = []
        for layer, (arguments, keywords) in zip(self.layers, self.calls):
            key = compiled_layers.signature(layer, arguments, keywords)
            if key not in known:
                known[key] = compiled_layers.kept(layer, arguments, keywords)
            graphs.append(known[key])
        eager = [b - a for a, b in zip(self.borders, [*self.borders[1:], self.after_decoder])]
        # A layer that is recomputed keeps its input in either case.
        again = [bool(getattr(layer, "gradient_checkpointing", False)) for layer in self.layers]
        keeps = [e if a else g for e, g, a in zip(eager, graphs, again)]
        self.kept += sum(keeps) - sum(eager)
        live = self.before + self.kept
        self.peak = live + self.head
        live += self.head_left
        for layer, keep, graph, recomputed in reversed(list(zip(self.layers, keeps, graphs, again))):
            self.peak = max(self.peak, live + (graph if recomputed else 0))
            live += size_of(p.grad for p in layer.parameters() if p.grad is not None) - keep
        self.peak = max(self.peak, live)

    def _entered(self, layer: Any, arguments: tuple, keywords: dict) -> None:
        if len(self.borders) < len(self.layers):  # not when it is recomputed
            self.borders.append(self.ledger.live)
            if self.compiled:
                self.calls.append((arguments, keywords))

    def _decoded(self, *_: Any) -> None:
        self.decoder_peak = self.ledger.peak
        self.after_decoder = self.ledger.restart()


def attention_work(made: Assembled, row: Row, device: str) -> tuple[int, int]:
    """Operations of causal attention inside each document: 2 heads head_dim L^2 forward, twice that backward; less
    those of its start, where that is run before it already."""
    config = made.network.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    _, found = spans(made, row, device)

    def seen(n: int, near: int | None) -> float:
        """Pairs of a token and one that it sees: L^2 / 2, or L w - w^2 / 2 with a window."""
        return n * n / 2 if near is None or n <= near else n * near - near * near / 2

    forward = 0
    for kind in kinds:
        near = window if kind == "sliding_attention" and window else None
        forward += int(4 * heads * width * sum(seen(n, near) - seen(before, near) for n, before in found))
    passed, layers = walked(made.network.model)
    return forward, int(2 * forward * passed / layers)

