"""Numbers that are not finite: their step is never applied; which module, gradients and weights they began in."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import write_atomically

BEGAN = "first in"


@dataclass
class Finding:
    """What one rank sees. Names are those of `named_modules` and `named_parameters`."""

    module: str | None = None
    how: str = ""
    """What about the module is not finite: output, input, loss, or a gradient on the way back."""
    weights: list[str] = field(default_factory=list)
    """Parameters and buffers that were not finite before the step."""
    gradients: list[str] = field(default_factory=list)
    """Parameters whose gradient, summed over ranks, is not finite."""

    def text(self) -> str:
        parts = [f"{BEGAN} {self.module} ({self.how})" if self.module else "no module of this rank's rows shows it"]
        if self.weights:
            parts.append(f"the weights were not finite before this step: {_few(self.weights)}")
        if self.gradients:
            parts.append(f"gradients of {_few(self.gradients)}")
        elif not self.module:
            parts.append("every gradient is finite, so it is their norm or sum that overflows")
        return "; ".join(parts)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def bad_weights(model: nn.Module) -> list[str]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if not finite(tensor)]


def bad_gradients(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    return [name for name, p in parameters.items() if p.grad is not None and not finite(p.grad)]


def generators(device: torch.device) -> list[Tensor]:
    """The states that dropout draws from: a step that is made again must drop the same. Costs no wait for a GPU."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def restore_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def drawn_again(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Random numbers as they were at `states`, and afterwards as if nothing had been drawn."""
    now, python, numpy = generators(device), random.getstate(), np.random.get_state()
    restore_generators(states, device)
    try:
        yield
    finally:
        restore_generators(now, device)
        random.setstate(python)
        np.random.set_state(numpy)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _tensors(member)


class Trace:
    """Hooks on every module that keep the first thing that is not finite, forward in order, then backward in order."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules
        self.running: list[str] = []  # the modules that are at work, outermost first
        self.found: tuple[str, str] | None = None

    def _saw(self, module: str, how: str, tensor: Tensor) -> None:
        if self.found is None and not finite(tensor):
            self.found = (module, how)

    def _before(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            owner = self.running[-1] if self.running else name
            for tensor in _tensors((args, kwargs)):
                self._saw(owner, f"made in its own forward, between its modules, and taken by {name}", tensor)
            self.running.append(name)
            return tuple(self._own(name, a) for a in args), {k: self._own(name, v) for k, v in kwargs.items()}

        return hook

    def _own(self, name: str, value: Any) -> Any:
        """An argument whose gradient is this module's alone, whoever else uses the tensor."""
        if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad:
            value = value.view_as(value)
            value.register_hook(lambda g: self._saw(name, "gradient of its input, made in its backward", g))
        return value

    def _after(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.running.pop()
            for tensor in _tensors(output):
                self._saw(name, "output of its forward", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda g: self._saw(name, "gradient of its output, made after it", g))

        return hook

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        compiled = [(m, m._compiled_call_impl) for m in self.modules.values()]
        for name, module in self.modules.items():
            module._compiled_call_impl = None  # a graph has no hooks
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(name), with_kwargs=True, always_call=False))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, call in compiled:
                module._compiled_call_impl = call


def first_module(
    model: nn.Module, objective: nn.Module, passes: Iterable[Callable[[], Tensor]]
) -> tuple[str | None, str]:
    """Make the passes of a step again, each to its loss [] and back, and name the first module that is not finite."""
    modules = {name: module for name, module in model.named_modules() if name}
    trace = Trace(modules)
    for loss_of in passes:
        with trace.watching():
            loss = loss_of()
            if trace.found is None and not finite(loss):
                trace.found = (f"{type(objective).__name__}, on the output layer", "loss")
            if trace.found is None:
                loss.backward()
        if trace.found:
            return trace.found
    return None, ""


class Guard:
    """Says what becomes of a step that is not finite, and counts those that were skipped. A part of checkpoints.

    All ranks see the same loss and norm, as both are sums over all of them: all decide alike.
    """

    def __init__(self, folder: Path, ranks: Any, on_nonfinite: str, max_skips: int):
        self.folder, self.ranks = folder / "nonfinite", ranks
        self.on_nonfinite, self.max_skips = on_nonfinite, max_skips
        self.total, self.in_a_row = 0, 0
        self.origin = ""  # of the last one

    def begin(self) -> None:
        """Before the first random number of a step."""
        self.drawn = generators(self.ranks.device)

    def fine(self, loss: float, norm: float) -> bool:
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        return False

    def skips(self) -> bool:
        return self.on_nonfinite == "skip" and self.in_a_row <= self.max_skips

    def remedy(self) -> str:
        if self.on_nonfinite == "skip":
            return f"These were {self.in_a_row} steps in a row: more than monitor.max_skips={self.max_skips}."
        return "Lower optim.learning_rate, look at those rows, or pass over such steps: monitor.on_nonfinite=skip."

    def explain(
        self, step: int, loss: float, norm: float, made: Any, parameters: Mapping[str, nn.Parameter], documents: list,
        passes: Iterable[Callable[[], Tensor]],
    ) -> str:  # fmt: skip
        """Make this rank's rows again, find where it began, and keep both. The gradients are used up."""
        model = made.network.model
        found = Finding(weights=bad_weights(model), gradients=bad_gradients(parameters))
        _forget(parameters)
        with drawn_again(self.drawn, self.ranks.device):
            found.module, found.how = first_module(model, made.objective, passes)
        _forget(parameters)
        path = self._keep(step, documents, {"loss": str(loss), "grad_norm": str(norm)} | asdict(found))
        said = self.ranks.texts(found.text() if found.module or self.ranks.first else "")
        rank = next((rank for rank, text in enumerate(said) if text.startswith(BEGAN)), 0)
        self.origin = f"rank {rank}: {said[rank]}" if self.ranks.world > 1 else said[rank]
        rows = ", ".join(str(d.row) for d in documents[:10])
        where = f"step {step}: loss {loss}, gradient norm {norm}; {self.origin}"
        return f"{where}. The batch is kept in {path} (rows {rows})."

    def _keep(self, step: int, documents: list, about: dict) -> Path:
        """This rank's rows as JSON lines, and what was found as JSON beside them."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step:08}-rank{self.ranks.rank}.jsonl"
        lines = [{"row": d.row, "tokens": d.tokens.tolist(), "weights": d.weights.tolist()} for d in documents]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        write_atomically(path.with_suffix(".json"), json.dumps({"step": step} | about, indent=1))
        return path

    def tensors(self) -> dict:
        return {}

    def numbers(self) -> dict:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def restore(self, tensors: Mapping, numbers: Mapping) -> None:
        self.total, self.in_a_row = numbers["total"], numbers["in_a_row"]


def _forget(parameters: Mapping[str, nn.Parameter]) -> None:
    for p in parameters.values():
        p.grad = None
