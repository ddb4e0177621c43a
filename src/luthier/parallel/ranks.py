"""The processes of a run: who am I, and sums over all of us. One process needs nothing of torch.distributed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError
from . import Parallel

BUCKET = 64 << 20  # elements summed in one message


class Ranks:
    """`world` processes started by torchrun, or one; gradients are summed, never averaged."""

    def __init__(self, config: Parallel):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = _device(config)
        if self.world > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=30))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, items: Sequence) -> list:
        return list(items[self.rank :: self.world])

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes the sum over all ranks, in few messages; a rank that had no rows adds zeros."""
        if self.world == 1:
            return
        here = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        moved = [p for p, ranks in zip(parameters, self.sum_(here).tolist()) if ranks]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
        bucket: list[Tensor] = []
        for i, gradient in enumerate(gradients):
            bucket.append(gradient)
            ahead = gradients[i + 1] if i + 1 < len(gradients) else None
            if ahead is None or ahead.dtype != gradient.dtype or sum(g.numel() for g in bucket) > BUCKET:
                flat = torch.cat([g.flatten() for g in bucket])
                dist.all_reduce(flat)
                for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                    g.copy_(part.view_as(g))
                bucket = []
        for p, gradient in zip(moved, gradients):
            p.grad = gradient

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Everybody takes the values of the first rank."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The bytes [n] uint8 of every rank, in their order, on all of them; lengths may differ."""
        if self.world == 1:
            return [mine]
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=self.device))
        longest = int(max(sizes))
        filled = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        filled[: len(mine)] = mine.to(self.device)
        parts = [torch.empty_like(filled) for _ in range(self.world)]
        dist.all_gather(parts, filled)
        return [part[: int(size)].cpu() for part, size in zip(parts, sizes)]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.world == 1:
            return flag
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)) > 0)

    def texts(self, text: str, longest: int = 500) -> list[str]:
        """What each rank says, the same list on all, cut after `longest` bytes."""
        said = torch.tensor(list(text.encode()[:longest]), dtype=torch.uint8)
        return [bytes(part.tolist()).decode(errors="ignore") for part in self.gather(said)]

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def _device(config: Parallel) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("parallel.device=cuda, but PyTorch sees no GPU here: use parallel.device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        _keep_freed_memory()
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _keep_freed_memory() -> None:
    """Ask glibc not to hand the memory of one step's activations back before the next step wants it."""
    import ctypes

    keep, largest = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(keep, (1 << 31) - 1)
        libc.mallopt(largest, 32 << 20)
