"""Live bytes and floating-point operations of what runs on the meta device, where tensors have shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .heap import Heap

aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Every storage that comes to be is counted until it is gone, those that autograd keeps included.

    `flops` counts matrix products, two operations for a multiplication with its addition; attention is not among them.
    """

    def __init__(self, heap: Heap | None = None) -> None:
        super().__init__()
        self.heap = heap  # a model of the allocator, told of every block
        self.live = self.peak = self.flops = 0
        self.known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Rules of shapes that are written in Python must see what is there, not what `Pretence` shows.
        with torch._C.DisableTorchFunction():
            if func is aten._local_scalar_dense.default and args[0].is_meta:
                return 1  # models ask masks whether all of it is true
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        self.flops += _product(func, args)
        return out

    def see(self, tensor: Tensor) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            self.known[key] = weakref.finalize(storage, self._gone, key, size)
            if self.heap is not None:
                self.heap.take(key, size)

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        del self.known[key]
        if self.heap is not None and key in self.heap.taken:
            self.heap.give(key)

    def restart(self) -> int:
        """Forget the peak so far; the bytes that live now."""
        self.peak = self.live
        return self.live


def _product(func: Any, args: tuple) -> int:
    """Operations of one matrix product."""
    packet = getattr(func, "overloadpacket", None)
    if packet in (aten.mm, aten.bmm):
        a, b = args[0], args[1]
    elif packet in (aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_):
        a, b = args[1], args[2]
    else:
        return 0
    return 2 * a.numel() * b.shape[-1]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
