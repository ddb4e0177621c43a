"""What runs of one process have in common, made once: rows as tokens, the tokenizer, the weights of the base."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
SHARE = 4  # a base is kept where it takes at most one part in so many of the memory that is free


class Shared:
    """Of each thing the last one is kept, under a key that changes with all that decides it."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Any]] = {}

    def kept(self, what: str, key: str, make: Callable[[], T]) -> T:
        """The thing that is kept, or a new one in its place; nobody may change it."""
        if what not in self._kept or self._kept[what][0] != key:
            self._kept.pop(what, None)  # not two at once
            self._kept[what] = key, make()
        return self._kept[what][1]

    def model(self, key: str, make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
        """A network of one's own, as `make` makes it on `device`; a copy of it stays behind on the CPU."""
        found = self._kept.get("model")
        if found is not None and found[0] == key:
            return copied(found[1], device)
        self._kept.pop("model", None)
        made = make()
        if _bytes(made) * SHARE <= _free_memory():
            self._kept["model"] = key, copied(made, torch.device("cpu"), pinned=device.type == "cuda")
        return made


def copied(model: nn.Module, device: torch.device, pinned: bool = False) -> nn.Module:
    """The same network with tensors of its own on `device`; what is tied stays tied, and no bit changes."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor.detach().to(device, copy=True)
        moved = moved.pin_memory() if pinned else moved
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if parameter else moved
    return copy.deepcopy(model, memo)


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _free_memory() -> int:
    """Bytes that are free in the computer's memory, or in that of its container; plenty where neither says."""
    free = 1 << 62
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # where nothing is limited, the file says `max`
        most, now = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - now)
    return free
